"""Mixture of experts over devices: tokens travel to their experts and back.

`mixture` takes global arrays; what it calls works on the shards inside `jax.shard_map`. Three forms
give the same numbers, up to the rounding of the experts' products:

- `local`: all experts on every device, or each device the choices of its own experts and a sum over
  devices (`axis_name`), for tokens that all of them have, as when serving;
- `exchanged`: other tokens on each device, which an all-to-all brings to the experts and back; or,
  on few devices, all of them to all devices, each of which computes its own experts' choices.

Nothing is dropped unless the caller leaves out choices by `kept`. `within_capacity` makes such a
mask from the counts of all devices: the global router of the paper (section 2.1).

Call these under `shard_map(..., check_vma=False)`: loops in the kernels do not declare over which
axes they vary.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import platform
from sharding.capacity import expert_capacity, within_capacity
from sharding.choices import by_expert, combine, dispatch, rows_of_each, weighted_sum
from sharding.exchange import AllToAll, Way, expert_lanes, gather_rows, move
from sharding.partition import Partition, gathered, on_shards

Exchange = Literal[AllToAll, "gathered"]

# (rows [M, D] sorted by expert, rows of each local expert [E']) -> [M, D], 0 past the last expert.
Compute = Callable[[jax.Array, jax.Array], jax.Array]


# ---------------------------------------------------------------- global arrays


def top_k(
    probabilities: Float[Array, "B T E"], k: int, *, partition: Partition | None
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """`jax.lax.top_k`, each device for its tokens: left to itself the compiler gathers them all."""

    def choose(probabilities):
        values, experts = jax.lax.top_k(probabilities, k)
        return values, experts

    if partition is None or not partition.splits("batch", "seq"):
        return choose(probabilities)
    spec = partition.spec(("batch", "seq"), probabilities.shape[:2], name="tokens")
    return on_shards(choose, partition, in_specs=(spec,), out_specs=(spec, spec))(probabilities)


def mixture(
    tokens: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    is_token: Bool[Array, "B T"],
    params: Any,
    *,
    param_axes: Any,
    compute: Callable[[Any, jax.Array, jax.Array], jax.Array],
    num_experts: int,
    partition: Partition | None,
    capacity_factor: float | None = None,
    recompute: bool = False,
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T k"] | None]:
    """sum_k weights_k expert_k(token), experts and tokens spread as the partition says.

    Where the rules split tokens over the mesh axis of the experts they are exchanged; where they do
    not, all devices of that axis have the tokens, and add up what their own experts give.

    Args:
      tokens: activations.
      weights: of each choice, fp32.
      experts: the choices, best first, distinct for each token.
      is_token: False for padding, which takes no room; without a capacity it goes to experts too.
      params: the experts' weights, a tree.
      param_axes: the same tree with the logical axes of each; 'embed' is gathered (ZeRO-3), and
        'expert_mlp' stays split, so that `compute` gives a part of the sum over it.
      compute: (params, rows [M, D], rows of each expert [E']) -> [M, D], for E' local experts;
        rows past the last expert give 0.
      num_experts: E.
      partition: None for one device; `expert_groups` of it is for tokens that are exchanged.
      capacity_factor: see `within_capacity`; None drops nothing.
      recompute, exchange: see `exchanged`.

    Returns:
      The output in fp32, and with a capacity which choices were kept.

    Raises:
      ValueError: sizes that the devices cannot share evenly, tokens that cannot be cut into the
        partition's groups, or rules that no exchange can follow.
    """
    body = functools.partial(
        _shard,
        compute=compute,
        num_experts=num_experts,
        capacity_factor=capacity_factor,
        groups=1 if partition is None else partition.expert_groups,
        recompute=recompute,
        exchange=exchange,
    )
    arrays = tokens, weights, experts, is_token, params
    names = ("batch", "seq", "experts", "expert_mlp", "expert_embed")
    if partition is None or not partition.splits(*names):
        return body(*arrays, split=_Split(), gather=lambda params: params)
    split = _split(partition)

    leading = partition.spec(("batch", "seq"), tokens.shape[:2], name="tokens")
    param_specs = jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes: partition.spec(
            axes, leaf.shape, name="experts" + jax.tree_util.keystr(path)
        ),
        params,
        param_axes,
    )

    def gather(params):
        whole = functools.partial(gathered, keep=("experts", "expert_mlp"))
        return jax.tree.map(whole, params, param_axes, param_specs)

    run = on_shards(
        functools.partial(body, split=split, gather=gather),
        partition,
        in_specs=(leading, leading, leading, leading, param_specs),
        out_specs=(leading, None if capacity_factor is None else leading),
    )
    return run(*arrays)


class _Split(NamedTuple):
    """Mesh axes that split the experts' logical axes, those of one device left out."""

    batch: tuple[str, ...] = ()
    seq: tuple[str, ...] = ()
    experts: str | None = None
    expert_mlp: tuple[str, ...] = ()


def _split(partition: Partition) -> _Split:
    names = ("batch", "seq", "experts", "expert_mlp")
    batch, seq, experts, expert_mlp = map(partition.axes_of, names)
    if len(experts) > 1:
        raise ValueError(
            f"rules {partition.rules.name!r} split 'experts' over {experts}; tokens are exchanged "
            "over one mesh axis: name one"
        )
    both = set(expert_mlp) & {*batch, *seq}
    if both:
        raise ValueError(
            f"rules {partition.rules.name!r} split 'expert_mlp' and the tokens over {both}; "
            "devices that share an expert must have the same tokens: take another mesh axis for one"
        )
    return _Split(batch, seq, experts[0] if experts else None, expert_mlp)


def _shard(
    tokens,
    weights,
    experts,
    is_token,
    params,
    *,
    compute,
    num_experts,
    capacity_factor,
    groups,
    recompute,
    exchange,
    split: _Split,
    gather: Callable[[Any], Any],
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T k"] | None]:
    """What one device does; see `mixture`."""
    per_token = experts.shape[-1]
    kept, capacity = None, None
    if capacity_factor is not None:
        kept = within_capacity(
            experts,
            is_token,
            num_experts=num_experts,
            capacity_factor=capacity_factor,
            batch_axes=split.batch,
            seq_axes=split.seq,
        )
        devices = math.prod(jax.lax.axis_size(axis) for axis in (*split.batch, *split.seq))
        capacity = expert_capacity(is_token.size * devices, per_token, num_experts, capacity_factor)

    with jax.named_scope("gather_experts"):
        params = gather(params)

    def run(rows, group_sizes):
        return compute(params, rows, group_sizes)

    flat_tokens = tokens.reshape(-1, tokens.shape[-1])
    flat_weights, flat_experts = weights.reshape(-1, per_token), experts.reshape(-1, per_token)
    flat_kept = None if kept is None else kept.reshape(-1, per_token)
    form: Any = local
    if split.experts in (*split.batch, *split.seq):
        form = functools.partial(
            exchanged, capacity=capacity, groups=groups, recompute=recompute, exchange=exchange
        )
    out = form(
        flat_tokens,
        flat_weights,
        flat_experts,
        run,
        num_experts=num_experts,
        axis_name=split.experts,
        kept=flat_kept,
        tensor_axes=split.expert_mlp,
    )
    return out.reshape(tokens.shape), kept


# ---------------------------------------------------------------- on each device


def local(
    tokens: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    experts: Int[Array, "N k"],
    compute: Compute,
    *,
    num_experts: int,
    axis_name: str | None = None,
    kept: Bool[Array, "N k"] | None = None,
    tensor_axes: tuple[str, ...] = (),
) -> Float[Array, "N D"]:
    """Mix the experts of tokens that every device of `axis_name` has.

    Args:
      tokens, weights, experts: as in `mixture`, flattened.
      compute: see `Compute`; it has the experts of this device, or a part of each (`tensor_axes`).
      num_experts: E.
      axis_name: mesh axis that splits the experts, in order; None when all are here.
      kept: choices to compute; None is all.
      tensor_axes: mesh axes that split the width of each expert.

    Returns:
      The sum, fp32, the same on all devices of `axis_name` and `tensor_axes`.
    """
    out = _own_share(
        tokens, weights, experts, compute, num_experts=num_experts, axis_name=axis_name, kept=kept
    )
    over = tensor_axes if axis_name is None else (axis_name, *tensor_axes)
    return jax.lax.psum(out, over) if over else out


def _own_share(
    tokens, weights, experts, compute: Compute, *, num_experts, axis_name, kept=None, most=None
) -> Float[Array, "N D"]:
    """What the experts of this device give to tokens that all devices have; choice E is none.

    No more than `most` choices are of these experts, so no more rows are computed.
    """
    here = num_experts
    mine = experts
    if axis_name is not None:
        here = num_experts // jax.lax.axis_size(axis_name)
        mine = experts - jax.lax.axis_index(axis_name) * here
    chosen = (mine >= 0) & (mine < here)
    if kept is not None:
        chosen = chosen & kept
    flat = jnp.where(chosen, mine, here).reshape(-1)
    order, place = by_expert(flat)
    rows: Any = dispatch(experts.shape[1], tokens, order, place)
    rows = compute(rows[:most], rows_of_each(flat, here))
    rows = jnp.pad(rows, ((0, flat.size - rows.shape[0]), (0, 0)))
    rows = combine(rows, order, place)
    return weighted_sum(rows.reshape(*experts.shape, -1), weights)


def exchanged(
    tokens: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    experts: Int[Array, "N k"],
    compute: Compute,
    *,
    num_experts: int,
    axis_name: str,
    kept: Bool[Array, "N k"] | None = None,
    capacity: int | None = None,
    tensor_axes: tuple[str, ...] = (),
    groups: int = 1,
    recompute: bool = False,
    exchange: Exchange | None = None,
) -> Float[Array, "N D"]:
    """Mix the experts of this device's own tokens by an all-to-all there and one back.

    Rows are sorted by expert before they leave and land sorted by expert, then by the device they
    come from. A device makes room for all that could come: N k rows from each of n devices, less
    where it has fewer than k experts or `capacity` says so. By `exchange` 'gathered' there is no
    all-to-all: all devices have the tokens of all, and each computes its own experts' choices.

    Args:
      tokens, weights, experts: as in `mixture`, flattened; experts are numbered globally.
      compute: see `Compute`, with the experts of this device.
      num_experts: E.
      axis_name: mesh axis that splits the experts, in order, and the tokens.
      kept: choices to send; None is all.
      capacity: no expert has more choices in `kept`, all devices together; None when unknown.
      tensor_axes: mesh axes that split the width of each expert; they have the same tokens.
      groups: parts of the tokens, one after the other in the program and independent of each other,
        so that the compiler may overlap one's exchange with another's products.
      recompute: run them in a loop instead and compute each again in its backward pass, so that
        only one is ever in memory. Where the layer is recomputed this takes no more work: its
        second forward pass needs no output of the experts, and is left out. But one's exchange is
        no longer beside another's products; on TPU it is not in either form unless libtpu is told
        to begin it early (`xla_tpu_enable_async_ragged_all_to_all`).
      exchange: 'ragged' sends the rows there are (GPU, TPU), 'padded' as many to each device as
        could be (everywhere), 'gathered' every token to every device and sums back. None is
        'gathered' where the devices are no more than k, as then it sends no more rows (but sums,
        and their gradients, in fp32) and needs no sizes; else 'padded' on CPU, which has no other
        all-to-all, and 'ragged' elsewhere.

    Returns:
      The sum, fp32.
    """
    count, per_token = experts.shape
    devices = jax.lax.axis_size(axis_name)
    here = num_experts // devices
    if groups < 1 or count % groups:
        raise ValueError(
            f"{count} tokens on each device cannot be cut into groups={groups}; choose a divisor"
        )
    if exchange not in (None, *get_args(Exchange)):
        raise ValueError(f"exchange is {exchange!r}; choose None or one of {get_args(Exchange)}")
    if exchange is None:
        all_to_all: AllToAll = "padded" if platform.target() == "cpu" else "ragged"
        exchange = "gathered" if devices <= per_token else all_to_all
    size = count // groups
    # The most choices of all devices that can be of one device's experts.
    received = size * min(per_token, here) * devices
    if capacity is not None:
        received = min(received, here * capacity)
    chosen = experts if kept is None else jnp.where(kept, experts, num_experts)
    parts = tokens.reshape(groups, size, -1), weights.reshape(groups, size, per_token)
    if exchange == "gathered":
        how = dict(num_experts=num_experts, axis_name=axis_name, most=received)
        share = functools.partial(_gathered_mix, compute=compute, **how)
        parts = *parts, chosen.reshape(groups, size, per_token)
        out = _in_turn(share, parts, recompute=recompute).reshape(tokens.shape)
        return jax.lax.psum(out, tensor_axes) if tensor_axes else out

    block = min(size * min(per_token, here), received)  # the most rows to one device
    flat = chosen.reshape(groups, size * per_token)
    counts = jax.vmap(rows_of_each, in_axes=(0, None))(flat, num_experts)
    # The one thing the groups share, before any of them: how many rows go from where to where.
    counts = jax.lax.all_gather(counts, axis_name)  # [n, groups, E]
    way = Way(axis_name, exchange, block, rows=received, rows_back=size * per_token)

    device = jax.lax.axis_index(axis_name)

    def mix(part):
        tokens, weights, flat, counts = part
        order, place = by_expert(flat)
        there, back, group_sizes = expert_lanes(counts, device)
        with jax.named_scope("dispatch"):
            rows: Any = dispatch(per_token, tokens, order, place)
            rows = move(way, rows, there, back)
        rows = compute(rows, group_sizes)
        with jax.named_scope("combine"):
            rows = move(way.reverse(), rows, back, there)
            rows = combine(rows, order, place)
            return weighted_sum(rows.reshape(size, per_token, -1), weights)

    parts = *parts, flat, jnp.swapaxes(counts, 0, 1)
    out = _in_turn(mix, parts, recompute=recompute).reshape(tokens.shape)
    # After the sum over k, of which there are fewer rows than of choices.
    return jax.lax.psum(out, tensor_axes) if tensor_axes else out


def _gathered_mix(part, *, axis_name: str, **how: Any) -> Float[Array, "N D"]:
    """Tokens of this device, by way of all tokens on all devices."""
    tokens, weights, chosen = part
    with jax.named_scope("dispatch"):
        tokens, weights = (gather_rows(axis_name, x) for x in (tokens, weights))
        chosen = jax.lax.all_gather(chosen, axis_name, tiled=True)
    out = _own_share(tokens, weights, chosen, axis_name=axis_name, **how)
    with jax.named_scope("combine"):
        return jax.lax.psum_scatter(out, axis_name, tiled=True)


def _in_turn(mix: Callable[[Any], jax.Array], parts: Any, *, recompute: bool) -> jax.Array:
    """`mix` of each part, stacked; `parts` have them along their first axis."""
    groups = len(parts[0])
    if recompute and groups > 1:
        # One at a time in the backward pass, too: independent of each other in a program, all
        # would be begun before the first is through, with room for every row that could come.
        again = jax.checkpoint(mix, prevent_cse=False)
        return jax.lax.scan(lambda _, part: (None, again(part)), None, parts)[1]
    outs = [mix(jax.tree.map(operator.itemgetter(group), parts)) for group in range(groups)]
    return jnp.stack(outs)
