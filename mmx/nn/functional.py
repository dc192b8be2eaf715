"""Parameter-free maths of the layers. fp32 inside, one cast at the end."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmx.nn.quantized import Int8
from pallas_kernels import (
    grouped_matmul,
    platform,
    skinny_matmul,
    skinny_matmul_supported,
)
from pallas_kernels.dispatch import einsum

# Element by element, in fp32: the backward pass computes these again from bf16 inputs rather than
# keep what is inside. Layers are scanned, so no later pass can merge the two.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], *, epsilon: float
) -> Float[Array, "... D"]:
    """Scale * x / sqrt(mean(x^2) + epsilon), in fp32, returned in the dtype of `x`."""

    @recomputed
    def normalise(x, scale):
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
        return normed.astype(x.dtype)

    return normalise(x, scale)


@recomputed
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """X * sigmoid(x), in fp32, returned in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


@recomputed
def swiglu(gate: Array, up: Array) -> Array:
    """Silu(gate) * up, elementwise; silu in fp32, the product in the dtype of `up`."""
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def project(
    subscripts: str, x: Array, kernel: Array | Int8, *, out_dtype: jnp.dtype | None = None
) -> Array:
    """An einsum of activations and weights: true fp32 for fp32 operands, fp32 accumulation always.

    The result has the dtype of `x` unless `out_dtype` says otherwise. With bf16 operands the
    gradient that comes back is rounded to bf16 before it is multiplied, so that all three products
    of a training step run at the speed of bf16. Weights in int8 are cast exactly and the scale
    multiplies the fp32 sum.
    """
    if isinstance(kernel, Int8):
        return _scaled(subscripts, x, kernel).astype(out_dtype or x.dtype)
    kernel = kernel.astype(x.dtype)
    if x.dtype.itemsize >= 4:
        return einsum(subscripts, x, kernel).astype(out_dtype or x.dtype)
    if out_dtype in (None, x.dtype):
        return _rounded(subscripts, x, kernel)
    wide: jax.Array = _widened(subscripts, x, kernel)
    return wide.astype(out_dtype)


class Product(NamedTuple):
    """One of the products of `project_together`: the arguments of `project`."""

    subscripts: str
    kernel: Array | Int8
    out_dtype: jnp.dtype | None = None


def project_together(x: Float[Array, "B T ..."], *products: Product, skinny: bool) -> list[Array]:
    """Several `project` of the same activations, whose last axes a product sums over.

    skinny: they are few and whole on one device, so `pallas_kernels.skinny_matmul` may take all
    products in one kernel. The result is the same up to the order of summation.
    """
    kinds = {isinstance(one.kernel, Int8) for one in products}
    if skinny and len(kinds) == 1:
        rows = x.reshape(x.shape[0] * x.shape[1], -1)
        kernels, scales = zip(*(as_read(one.kernel, x.dtype) for one in products), strict=True)
        matrices = [kernel.reshape(rows.shape[1], -1) for kernel in kernels]
        if skinny_matmul_supported(rows, *matrices):
            scales = [scale.reshape(-1) for scale in scales] if kinds == {True} else None
            results = skinny_matmul(rows, *matrices, scales=scales)
            return [
                result.reshape(*x.shape[:2], *kernel.shape[x.ndim - 2 :]).astype(
                    product.out_dtype or x.dtype
                )
                for product, kernel, result in zip(products, kernels, results, strict=True)
            ]
    return [project(one.subscripts, x, one.kernel, out_dtype=one.out_dtype) for one in products]


def as_read(kernel: Array | Int8, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """A matrix as operations read it, int8 or cast to `dtype`, and the scale of one in int8."""
    if isinstance(kernel, Int8):
        return kernel.values, kernel.scale
    return kernel.astype(dtype), None


def project_groups(
    rows: Float[Array, "M K"],
    kernel: Float[Array, "G K N"] | Int8,
    group_sizes: Int[Array, "G"],
    *,
    implementation: str | None,
) -> Float[Array, "M N"]:
    """Rows sorted by group, each group times its own matrix: `pallas_kernels.grouped_matmul`."""
    if isinstance(kernel, Int8):
        return grouped_matmul(
            rows, kernel.values, group_sizes, w_scale=kernel.scale, implementation=implementation
        )
    kernel = kernel.astype(rows.dtype)
    return grouped_matmul(rows, kernel, group_sizes, implementation=implementation)


def _scaled(subscripts: str, x: Array, kernel: Int8) -> Array:
    """The fp32 product with an int8 matrix."""
    operands, out = subscripts.split("->")
    axes = zip(operands.split(",")[1], kernel.scale.shape, strict=True)
    # What is left of the matrix are the last axes of the product, in the same order.
    scale = kernel.scale.reshape([size for axis, size in axes if axis in out])
    # Tied to x: else a loop over tokens casts the whole matrix once before it, and keeps the copy.
    x, values = jax.lax.optimization_barrier((x, kernel.values))
    return einsum(subscripts, x, values.astype(x.dtype)) * scale


def _rounded(subscripts: str, x: Array, kernel: Array) -> Array:
    """The result of a bf16 product, added up in fp32 and rounded once."""
    if platform.target() == "cpu":
        # XLA's CPU backend adds some products with a bf16 result up in bf16.
        return einsum(subscripts, x, kernel).astype(x.dtype)
    return jnp.einsum(subscripts, x, kernel, preferred_element_type=x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widened(subscripts: str, x: Array, kernel: Array) -> Array:
    """The fp32 result of a bf16 product."""
    return einsum(subscripts, x, kernel)


def _widened_forward(subscripts, x, kernel):
    return _widened(subscripts, x, kernel), (x, kernel)


def _widened_backward(subscripts, operands, grad):
    _, pull = jax.vjp(functools.partial(_rounded, subscripts), *operands)
    return pull(grad.astype(operands[0].dtype))


_widened.defvjp(_widened_forward, _widened_backward)


def rotary_embedding(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, rotary_dim: int, theta: float
) -> Float[Array, "B T H K"]:
    """Rotate the first `rotary_dim` channels of each head, halves paired: (i, i + rotary_dim / 2).

    Frequencies are theta^(-2i / rotary_dim). Angles are exact to fp32 at any position: the number
    of turns is kept as a 32-bit fraction, where the usual fp32 product position * frequency would
    be off by a quarter radian at four million tokens.
    """
    half = rotary_dim // 2
    angles = _angles(positions, half, theta)[:, :, None, :]  # [B, T, 1, half]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x[..., :rotary_dim].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary_dim:]], axis=-1)


def _angles(positions: Int[Array, "B T"], half: int, theta: float) -> Float[Array, "B T half"]:
    """Positions * theta^(-i / half) in [-pi, pi), from 64-bit fixed-point turns per token."""
    turns = [theta ** (-i / half) / (2 * math.pi) for i in range(half)]
    fixed = [int(t % 1.0 * 2**64) for t in turns]  # integers: exact, where float64 keeps 53 bits
    high = jnp.asarray(np.array([f >> 32 for f in fixed], np.uint32))
    low = jnp.asarray(np.array([f & 0xFFFFFFFF for f in fixed], np.uint32))
    position = positions.astype(jnp.uint32)[..., None]
    # Upper 32 bits of position * (high 2^32 + low), modulo whole turns: uint32 wraps by itself.
    fraction = position * high + _multiply_high(position, low)
    signed = jax.lax.bitcast_convert_type(fraction, jnp.int32)
    return signed.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def _multiply_high(a: Array, b: Array) -> Array:
    """Upper 32 bits of the 64-bit product of two uint32 arrays."""
    a_low, a_high = a & 0xFFFF, a >> 16
    b_low, b_high = b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carry = (a_low * b_high + (middle & 0xFFFF)) >> 16
    return a_high * b_high + (middle >> 16) + carry
