"""The grouped matmul on TPU: the megablox kernels that come with jax, made whole.

    forward   out[m] = x[m] w[g]            gmm
    grad_x    grad_x[m] = grad[m] w[g]^T    gmm, w read transposed
    grad_w    grad_w[g] = x_g^T grad_g      tgmm

The kernels walk over tiles of rows; a tile in which a group ends is visited once for each of its
groups. What they leave to the caller is done here: the number of rows becomes a multiple of the
tile's, rows past the last group (never written by gmm) become 0, fp32 operands get fp32 products,
and tiles are chosen so that the kernels fit into the VMEM that every generation grants a kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# The module of the kernels; the name in the package is the function with their own derivative.
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from pallas_kernels import platform

LANES = 128
# Rows that fill a register in bf16: fewer would not be a tile.
LEAST_ROWS = 16
MOST_ROWS = 512
# Bytes of the longest sides of a tile, inner dimension and columns, chosen with the compiler: with
# 6144 x 9216 matrices the kernels then take at most 14.5 of the 16 MiB that v4 and v5 grant them.
GMM_SIDES = (1536, 3072)
TGMM_SIDES = (2048, 2304)


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    """See `pallas_kernels.grouped_matmul`; bf16 or fp32, any M, K, N and group sizes.

    A number of rows that is no multiple of the tile (at most 512) is padded, which copies `x`.
    fp32 inputs get true fp32 products, at about a sixth of the speed of bf16.
    """
    return _grouped_matmul(False, x, w, group_sizes.astype(jnp.int32))


def unsupported(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> str | None:
    """Why these arguments cannot be served, or None.

    The platform is that of the mesh in use if there is one (so that compiling ahead of time for a
    TPU topology is served), else the default backend's.
    """
    del group_sizes
    target = platform.target()
    if target != "tpu":
        return f"platform {target!r} (it needs a TPU)"
    for array in (x, w):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"dtype {array.dtype} (it takes bfloat16 and float32)"
    if 0 in (*x.shape, *w.shape):
        return f"the empty arrays x {x.shape}, w {w.shape}"
    return None


# ---------------------------------------------------------------- differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(interpret: bool, x, w, group_sizes) -> jax.Array:
    return _multiply(x, w, group_sizes, transposed=False, interpret=interpret)


def _forward(interpret, x, w, group_sizes):
    return _grouped_matmul(interpret, x, w, group_sizes), (x, w, group_sizes)


def _backward(interpret, residuals, grad):
    x, w, group_sizes = residuals
    grad_x = _multiply(grad, w, group_sizes, transposed=True, interpret=interpret)
    return grad_x, _multiply_transposed(x, grad, group_sizes, interpret=interpret), None


_grouped_matmul.defvjp(_forward, _backward)


# ---------------------------------------------------------------- products


def _multiply(x, w, group_sizes, *, transposed: bool, interpret: bool) -> jax.Array:
    """[M, N]: x[m] @ w[g], or x[m] @ w[g]^T where transposed; 0 past the last group."""
    rows, inner = x.shape
    columns = w.shape[1] if transposed else w.shape[2]
    tiling = _tiling(rows, inner, columns, w.shape[0], x.dtype, GMM_SIDES)
    with _precision(x.dtype):
        out = gmm(
            _pad_rows(x, tiling[0]),
            w,
            group_sizes,
            preferred_element_type=x.dtype,
            tiling=tiling,
            transpose_rhs=transposed,
            interpret=_interpreter(interpret),
        )
    # Selected, never multiplied: what was there before may be NaN.
    inside = jnp.arange(rows)[:, None] < jnp.sum(group_sizes)
    return jnp.where(inside, out[:rows], jnp.zeros((), x.dtype))


def _multiply_transposed(x, y, group_sizes, *, interpret: bool) -> jax.Array:
    """[G, K, N]: the sum over the rows m of each group of x[m]^T y[m]."""
    rows, inner = x.shape
    tiling = _tiling(rows, inner, y.shape[1], group_sizes.shape[0], x.dtype, TGMM_SIDES)
    with _precision(x.dtype):
        return tgmm(
            _pad_rows(x, tiling[0]).T,  # tgmm transposes it back, so neither is done
            _pad_rows(y, tiling[0]),
            group_sizes,
            preferred_element_type=x.dtype,
            tiling=tiling,
            interpret=_interpreter(interpret),
        )


def _precision(dtype):
    """True fp32 products of fp32 operands; the kernels name no precision of their own."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _interpreter(interpret: bool) -> Any:
    return pltpu.InterpretParams() if interpret else False


def _pad_rows(x, tile: int):
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _tiling(
    rows: int, inner: int, columns: int, groups: int, dtype, sides: tuple[int, int]
) -> tuple[int, int, int]:
    """Tile sizes of rows, inner dimension and columns; `sides` in bytes limits the last two."""
    # A group costs one tile of rows more than it fills, so tiles are small against groups.
    wanted = max(LANES, _power_of_two(rows // groups) // 4)
    tile = min(MOST_ROWS, wanted, -(-rows // LEAST_ROWS) * LEAST_ROWS)
    most_inner, most_columns = (side // jnp.dtype(dtype).itemsize for side in sides)
    return tile, _side(inner, most_inner), _side(columns, most_columns)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n; 1 for 0."""
    return 1 << max(n, 1).bit_length() - 1


def _side(size: int, most: int) -> int:
    """All of it, or the multiple of 128 up to `most` that covers `size` with the fewest lanes."""
    if size <= most:
        return size
    return min(range(LANES, most + 1, LANES), key=lambda side: (-(-size // side) * side, -side))
