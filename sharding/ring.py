"""Softmax attention over a sequence that is split over devices: keys and values go round a ring.

Of a causal row the first shard would have next to no work and the last one all of it. So the row is
cut into 2 n chunks for n devices, and for the length of this layer device i has the chunks i and
2 n - 1 - i, a low and a high one (zig-zag). Two permutations bring queries, keys, values and ids
there and the output back. Then a device has as much work with the keys of any other device:

    its own keys                 one causal product of both its chunks
    keys of an earlier device    both its chunks see the low chunk there, none the high one
    keys of a later device       its high chunk sees both chunks there, its low one none

Each block gives an output and a log-sum-exp, merged in fp32. The backward pass goes round once
more with the merged log-sum-exp; gradients of keys and values, in fp32, travel with their keys and
values and are at home after the last step. What is to be sent at a step was there before it and is
not made by it, so that communication and products can run at once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.dispatch import accumulation_dtype, require_shape
from pallas_kernels.softmax_attention.reference import residuals
from sharding.mesh import AxisName

# Keys, values and segment ids of a shard in zig-zag order, as they go round.
Block = tuple[Array, Array, Array | None]


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    axis_name: AxisName,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Causal `pallas_kernels.softmax_attention` of rows in order over the axis `axis_name`.

    Call it inside `jax.shard_map(..., check_vma=False)`; T is the length of a shard. Output and
    gradients are those of the whole rows. Key heads travel as they are, G of them.

    Args:
      q, k, v, segment_ids: this device's shard; an id of 0 is padding, which gives 0.
      axis_name: the mesh axis, or axes; the devices along it, n of them, have a shard each. Rows
        and heads may be split over other axes.
      scale: 1/sqrt(K) when None.
      implementation: of the kernel, for every block.

    Raises:
      ValueError: a shard of odd length; shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.

    A device sends its keys, values and ids n - 1 times forward and as often backward, and n times
    fp32 gradients of keys and values backward; besides, its q, k, v and output go to zig-zag order
    and back once.
    """
    name = "ring.softmax_attention"
    shape = q.shape[:2]
    require_shape(name, "k", k, (*shape, *k.shape[2:]))
    require_shape(name, "v", v, (*shape, *v.shape[2:]))
    if segment_ids is not None:
        require_shape(name, "segment_ids", segment_ids, shape)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if jax.lax.axis_size(axis_name) == 1:
        out: Any = pallas_kernels.softmax_attention(
            q, k, v, segment_ids=segment_ids, scale=scale, implementation=implementation
        )
        return out
    if shape[1] % 2:
        raise ValueError(
            f"{name}: {shape[1]} tokens a device are no two equal chunks; pad the rows with "
            "segment id 0 to a multiple of twice the devices of the axis"
        )
    to_zigzag = functools.partial(_to_zigzag, axis_name)
    arrays = jax.tree.map(to_zigzag, (q, k, v, segment_ids))
    return _from_zigzag(axis_name, _attend(_Ring(axis_name, scale, implementation), *arrays))


# ---------------------------------------------------------------- who works on what


def chunk(device: int, half: int, devices: int) -> int:
    """The chunk of the row, of 2 * devices, that is the low (0) or high (1) half of a device."""
    return 2 * devices - 1 - device if half else device


# (half of the queries, half of the keys) of the blocks in a device's product with its own keys; the
# first and the last are of a chunk with itself, so half a block each.
OWN_BLOCKS = ((0, 0), (1, 0), (1, 1))


def whole_blocks(device: Any, source: Any) -> tuple[tuple[Any, Any], ...]:
    """The same of its products with the keys of another device; the numbers may be traced."""
    later = (source > device) * 1
    return ((1, 0), (later, later))


def _exchange(axis_name: AxisName, half: int) -> list[tuple[int, int]]:
    """Where the first or second halves of shards in order go: (from, to)."""
    n = jax.lax.axis_size(axis_name)
    return [(i, min(2 * i + half, 2 * n - 1 - (2 * i + half))) for i in range(n)]


def _to_zigzag(axis_name: AxisName, x: Array) -> Array:
    """[B, T, ...] in order -> the low and the high chunk of this device."""
    first, second = (
        jax.lax.ppermute(part, axis_name, _exchange(axis_name, half))
        for half, part in enumerate(jnp.split(x, 2, axis=1))
    )
    # Chunks of even numbers were first halves.
    even = jax.lax.axis_index(axis_name) % 2 == 0
    low, high = jnp.where(even, first, second), jnp.where(even, second, first)
    return jnp.concatenate([low, high], axis=1)


def _from_zigzag(axis_name: AxisName, x: Array) -> Array:
    low, high = jnp.split(x, 2, axis=1)
    even = jax.lax.axis_index(axis_name) % 2 == 0
    halves = jnp.where(even, low, high), jnp.where(even, high, low)
    halves = (
        jax.lax.ppermute(part, axis_name, [(b, a) for a, b in _exchange(axis_name, half)])
        for half, part in enumerate(halves)
    )
    return jnp.concatenate(list(halves), axis=1)


# ---------------------------------------------------------------- the ring


@dataclass(frozen=True)
class _Ring:
    """The static arguments."""

    axis_name: AxisName
    scale: float
    implementation: str | None


def _circulate(
    axis_name: AxisName,
    block: Block,
    travelling: Any,
    kept: Any,
    visit: Callable[[Array, Block, Any, Any], tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Let every other device's block come by: `visit(source, block, travelling, kept)`.

    `travelling` goes with the block; it is returned at home. `kept` stays on the device.
    """
    n, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def pass_on(tree):
        to_next = [(i, (i + 1) % n) for i in range(n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, to_next), tree)

    def step(number, carry):
        block, travelling, kept = carry
        following = pass_on(block)  # before the products, which do not wait for it
        return following, *visit((here - number) % n, block, pass_on(travelling), kept)

    block, travelling, kept = jax.lax.fori_loop(1, n - 1, step, (pass_on(block), travelling, kept))
    travelling, kept = visit((here + 1) % n, block, pass_on(travelling), kept)
    return pass_on(travelling), kept


def _half(x: Any, half: int | Array) -> Any:
    """Half of the tokens of each array [B, T, ...]."""
    length = jax.tree.leaves(x)[0].shape[1] // 2
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, half * length, length, axis=1), x)


def _with_half(x: Any, part: Any, half: int | Array) -> Any:
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, half * part.shape[1], axis=1),
        x,
        part,
    )


# ---------------------------------------------------------------- forward and backward


def _merge(one, other):
    """(output, log-sum-exp) over two sets of keys; the output in at least fp32."""
    lse = jnp.logaddexp(one[1], other[1])
    # Where nothing is seen yet all are -inf, and the weights exp(-inf - 0) the 0 they should be.
    total = jnp.where(lse > -jnp.inf, lse, 0)
    weights = (jnp.exp(part[1] - total)[..., None] for part in (one, other))
    return sum(part[0] * w for part, w in zip((one, other), weights, strict=True)), lse


def _attend_primal(ring: _Ring, q, k, v, ids) -> Array:
    return _attend_forward(ring, q, k, v, ids)[0]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


def _attend_forward(ring: _Ring, q, k, v, ids):
    here = jax.lax.axis_index(ring.axis_name)

    def attend(q, ids, block: Block, *, causal):
        k, v, kv_ids = block
        out, lse = pallas_kernels.softmax_attention(
            q, k, v, causal=causal, segment_ids=ids, kv_segment_ids=kv_ids, scale=ring.scale,
            return_lse=True, implementation=ring.implementation,
        )  # fmt: skip
        return out.astype(accumulation_dtype(out.dtype)), lse

    def visit(source, block, travelling, merged):
        for mine, theirs in whole_blocks(here, source):
            queries, query_ids = _half((q, ids), mine)
            part = attend(queries, query_ids, _half(block, theirs), causal=False)
            merged = _with_half(merged, _merge(_half(merged, mine), part), mine)
        return travelling, merged

    block = (k, v, ids)
    merged = attend(q, ids, block, causal=True)
    _, (out, lse) = _circulate(ring.axis_name, block, (), merged, visit)
    # Named in zig-zag order, in which the backward pass wants them.
    out, lse = residuals(out.astype(v.dtype), lse)
    return out, (q, k, v, ids, out, lse)


def _attend_backward(ring: _Ring, saved, grad_out):
    q, k, v, ids, out, lse = saved
    here = jax.lax.axis_index(ring.axis_name)

    # The definition has no backward pass by blocks; the portable form of it stands in.
    implementation = "xla" if ring.implementation == "reference" else ring.implementation

    def gradients(queries, block: Block, *, causal):
        q, ids, *rest = queries
        k, v, kv_ids = block
        grads = pallas_kernels.attention_block_backward(
            q, k, v, *rest, causal=causal, segment_ids=ids, kv_segment_ids=kv_ids,
            scale=ring.scale, implementation=implementation,
        )  # fmt: skip
        grad_q, *grad_kv = (x.astype(accumulation_dtype(x.dtype)) for x in grads)
        return grad_q, tuple(grad_kv)

    def visit(source, block, grad_kv, grad_q):
        for mine, theirs in whole_blocks(here, source):
            to_q, to_kv = gradients(_half(queries, mine), _half(block, theirs), causal=False)
            grad_q = _with_half(grad_q, _half(grad_q, mine) + to_q, mine)
            summed = jax.tree.map(jnp.add, _half(grad_kv, theirs), to_kv)
            grad_kv = _with_half(grad_kv, summed, theirs)
        return grad_kv, grad_q

    queries, block = (q, ids, out, lse, grad_out), (k, v, ids)
    grad_q, grad_kv = gradients(queries, block, causal=True)
    (grad_k, grad_v), grad_q = _circulate(ring.axis_name, block, grad_kv, grad_q, visit)
    return grad_q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
