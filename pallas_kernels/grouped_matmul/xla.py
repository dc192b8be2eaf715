"""The grouped matmul in plain jax, without G-fold work.

Each group is cut into blocks of rows, a loop takes one block after the other and multiplies it by
the matrix of its group. At most min(G, M) blocks are partly empty, so the work is that of the rows
there are. `jax.lax.ragged_dot` is not used: on GPU and CPU, jax 0.11.2 expands it to dense work.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import accumulation_dtype, einsum

MAX_BLOCK_ROWS = 512


class _Blocks(NamedTuple):
    """Blocks of rows: `size` is static, the rest are arrays over the blocks."""

    size: int
    total: Int[Array, ""]
    group: Int[Array, "blocks"]
    begin: Int[Array, "blocks"]
    end: Int[Array, "blocks"]


def _cut_into_blocks(group_sizes: Int[Array, "G"], rows: int) -> _Blocks:
    groups = group_sizes.shape[0]
    # About one block a group, so that partly empty blocks cost at most as much as full ones.
    size = min(rows, MAX_BLOCK_ROWS, max(8, 1 << (-(-rows // groups) - 1).bit_length()))
    nonempty = min(groups, rows)
    bound = (rows - nonempty) // size + nonempty
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // size)
    block_ends = jnp.cumsum(counts)
    index = jnp.arange(bound, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), groups - 1)
    begin = (ends - sizes)[group] + (index - (block_ends - counts)[group]) * size
    return _Blocks(size, block_ends[-1], group, begin, jnp.minimum(begin + size, ends[group]))


def _take(x: Float[Array, "M N"], blocks: _Blocks, i: Int[Array, ""]):
    """Rows of block i, zeros where the block reaches past its group, and the slice's first row."""
    first = jnp.minimum(blocks.begin[i], x.shape[0] - blocks.size)
    row = first + jnp.arange(blocks.size)
    inside = (row >= blocks.begin[i]) & (row < blocks.end[i])
    rows = jax.lax.dynamic_slice_in_dim(x, first, blocks.size)
    return jnp.where(inside[:, None], rows, 0), first


def _multiply(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Int[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    contract: str,
    w_scale: Float[Array, "G 1 N"] | None = None,
) -> Float[Array, "M N"]:
    """x[m] @ w[g] with contract='mk,kn->mn', x[m] @ w[g]^T with 'mn,kn->mk'."""
    blocks = _cut_into_blocks(group_sizes, x.shape[0])
    columns = w.shape[2] if contract.endswith("mn") else w.shape[1]

    def step(i, out):
        rows, first = _take(x, blocks, i)
        matrix = jax.lax.dynamic_index_in_dim(w, blocks.group[i], keepdims=False)
        # Cast here: of an int8 w there is never more than one matrix in the dtype of x.
        product = einsum(contract, rows, matrix.astype(x.dtype))
        if w_scale is not None:
            product *= jax.lax.dynamic_index_in_dim(w_scale, blocks.group[i], keepdims=False)
        product = product.astype(x.dtype)
        # Rows of other groups are zero in `product`, so adding writes only this block's rows.
        before = jax.lax.dynamic_slice_in_dim(out, first, blocks.size)
        return jax.lax.dynamic_update_slice_in_dim(out, before + product, first, 0)

    out = jnp.zeros((x.shape[0], columns), x.dtype)
    return jax.lax.fori_loop(0, blocks.total, step, out)


def _multiply_transposed(
    x: Float[Array, "M K"], y: Float[Array, "M N"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G K N"]:
    """Sum over the rows m of each group of x[m]^T y[m], accumulated in fp32."""
    blocks = _cut_into_blocks(group_sizes, x.shape[0])
    dtype = accumulation_dtype(x.dtype)

    def step(i, out):
        product = einsum("mk,mn->kn", _take(x, blocks, i)[0], _take(y, blocks, i)[0])
        group = blocks.group[i]
        before = jax.lax.dynamic_index_in_dim(out, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, before + product, group, 0)

    out = jnp.zeros((group_sizes.shape[0], x.shape[1], y.shape[1]), dtype)
    return jax.lax.fori_loop(0, blocks.total, step, out)


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Int[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    w_scale: Float[Array, "G 1 N"] | None = None,
) -> Float[Array, "M N"]:
    """Blocked form of `pallas_kernels.grouped_matmul`."""
    return _multiply(x, w, group_sizes, "mk,kn->mn", w_scale)


def _forward(x, w, group_sizes, w_scale):
    if w_scale is not None:
        raise NotImplementedError("grouped_matmul: an int8 w passes no gradient; train in bf16")
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, grad):
    x, w, group_sizes = residuals
    grad_x = _multiply(grad, w, group_sizes, "mn,kn->mk")
    return grad_x, _multiply_transposed(x, grad, group_sizes).astype(w.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)
