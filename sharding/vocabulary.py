"""Embedding and cross entropy with the vocabulary spread over devices.

A device has some of the words. It looks up those it has, and the others give 0 in a sum; of the
logits it makes those of its words, and devices tell each other a maximum, a sum and the logit of
the target for each token. Logits are never gathered.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.partition import Partition, gathered, on_shards


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, partition: Partition | None = None
) -> Float[Array, "B T D"]:
    """Row `tokens` of the table; NaN for an id out of range.

    Args:
      table: logical axes ('vocab', 'embed').
      tokens: ids.
      partition: None for one device.

    Raises:
      ValueError: sizes that the devices cannot share evenly, or rules that split 'vocab' and the
        tokens over one mesh axis.
    """
    if partition is None or not partition.splits("batch", "seq", "vocab", "embed"):
        return _rows(table, tokens, 0, table.shape[0])
    rows, _ = _specs(partition, (*tokens.shape, table.shape[0]))
    axes = ("vocab", "embed")
    split = partition.spec(axes, table.shape, name="embedding")
    over = partition.axes_of("vocab")

    def body(table, tokens):
        table = gathered(table, axes, split, keep=("vocab",))
        if not over:
            return _rows(table, tokens, 0, table.shape[0])
        size = table.shape[0]
        first = jax.lax.axis_index(over) * size
        found = _rows(table, tokens, first, size * jax.lax.axis_size(over))
        return jax.lax.psum(found, over)

    return on_shards(body, partition, in_specs=(split, rows), out_specs=rows)(table, tokens)


def _rows(table, tokens, first, vocab_size: int) -> Float[Array, "B T D"]:
    """The rows from `first` on that are here, 0 for those elsewhere, NaN for those nowhere."""
    # As uint32 a negative id is out of range too; out of range is never another row.
    if table.shape[0] == vocab_size:
        return _take(table, tokens.astype(jnp.uint32), jnp.nan)
    found: Any = _take(table, (tokens - first).astype(jnp.uint32), 0)
    exists = (tokens >= 0) & (tokens < vocab_size)
    return jnp.where(exists[..., None], found, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table, index, absent: float) -> Float[Array, "B T D"]:
    """Rows of a table, and `absent` for those it does not have; gradients are summed in fp32.

    A frequent word has thousands of summands, and in bf16 a sum stands still after some hundreds.
    """
    return table.at[index].get(mode="fill", fill_value=absent)


def _take_forward(table, index, absent):
    return _take(table, index, absent), (table, index)


def _take_backward(absent, saved, grad):
    del absent
    table, index = saved
    total = jnp.zeros(table.shape, jnp.float32)
    return total.at[index].add(grad.astype(jnp.float32), mode="drop").astype(table.dtype), None


_take.defvjp(_take_forward, _take_backward)


def token_losses(
    x: Float[Array, "B T D"],
    head: Any,
    targets: Int[Array, "B T"],
    *,
    logits: Callable[[Any, jax.Array], jax.Array],
    head_axes: Any,
    vocab_size: int,
    blocks: int = 1,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """-log softmax(logits)[target] and logsumexp(logits) of each token, a block at a time.

    The backward pass computes the logits of a block again, so that fp32 logits are never there for
    more than one.

    Args:
      x: activations.
      head: its weights, a tree.
      targets: ids in [0, V).
      logits: (head, x [b, t, D]) -> fp32 [b, t, V'], for a head with V' of the words.
      head_axes: the same tree with the logical axes of each, 'vocab' and 'embed'.
      vocab_size: V.
      blocks: how many, of each device's share of the sequence.
      partition: None for one device.

    Raises:
      ValueError: see `lookup`.
    """
    body = functools.partial(_blockwise, logits=logits, blocks=blocks)
    if partition is None or not partition.splits("batch", "seq", "vocab", "embed"):
        return body(x, head, targets, over=())
    rows, over = _specs(partition, (*targets.shape, vocab_size))
    split = jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes: partition.spec(
            axes, leaf.shape, name="head" + jax.tree_util.keystr(path)
        ),
        head,
        head_axes,
    )

    def run(x, head, targets):
        head = jax.tree.map(functools.partial(gathered, keep=("vocab",)), head, head_axes, split)
        return body(x, head, targets, over=over)

    spread = on_shards(run, partition, in_specs=(rows, split, rows), out_specs=(rows, rows))
    return spread(x, head, targets)


def _specs(partition: Partition, shape: tuple[int, ...]) -> tuple[Any, tuple[str, ...]]:
    """How tokens are split, and the axes of the vocabulary, for logits of this shape."""
    # The logits' own spec refuses an axis that splits both.
    partition.spec(("batch", "seq", "vocab"), shape, name="logits")
    return partition.spec(("batch", "seq"), shape[:2], name="tokens"), partition.axes_of("vocab")


def _blockwise(x, head, targets, *, logits, blocks: int, over: tuple[str, ...]):
    if blocks == 1:
        return losses_of(logits(head, x), targets, over=over)
    batch, length = targets.shape
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, head)
    # The gradient of the head is a sum over the blocks: in fp32, then rounded once.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head)

    def block(inputs):
        x, targets = inputs
        head = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), wide, dtypes)
        return losses_of(logits(head, x), targets, over=over)

    size = -(-length // blocks)

    def cut(array):
        pad = ((0, 0), (0, size * blocks - length)) + ((0, 0),) * (array.ndim - 2)
        shape = (batch, blocks, size, *array.shape[2:])
        return jnp.moveaxis(jnp.pad(array, pad).reshape(shape), 1, 0)

    outputs = jax.lax.map(jax.checkpoint(block, prevent_cse=False), (cut(x), cut(targets)))
    losses, log_totals = (
        jnp.moveaxis(values, 0, 1).reshape(batch, -1)[:, :length] for values in outputs
    )
    return losses, log_totals


def losses_of(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], *, over: tuple[str, ...] = ()
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """-log softmax(logits)[target], NaN for a target out of range, and logsumexp(logits).

    Args:
      logits: fp32; of this device's words, when `over` names the mesh axes that split them.
      targets: ids of the whole vocabulary.
      over: empty outside `jax.shard_map`.
    """
    if not over:
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = _logits_of(logits, targets)
        return log_total - chosen, log_total
    # The maximum only keeps the exponentials in range: the result does not depend on it.
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    largest = jax.lax.stop_gradient(jax.lax.pmax(largest, over))
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    size = logits.shape[-1]
    place = targets - jax.lax.axis_index(over) * size
    here = (place >= 0) & (place < size)
    elsewhere = (targets >= 0) & (targets < size * jax.lax.axis_size(over)) & ~here
    chosen = jnp.where(elsewhere, 0, _logits_of(logits, place))
    total, chosen = jax.lax.psum((total, chosen), over)
    log_total = largest + jnp.log(total)
    return log_total - chosen, log_total


def _logits_of(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The logit of each target, NaN for one that is not among them."""
    exists = (targets >= 0) & (targets < logits.shape[-1])
    index = jnp.where(exists, targets, 0)
    return jnp.where(
        exists, jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0], jnp.nan
    )
