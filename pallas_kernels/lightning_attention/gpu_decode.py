"""One token of lightning attention on Hopper GPUs, in place: each state is read and written once.

A worker, one warpgroup, has 64 columns of the state of one row and head in its registers. XLA would
read the states of a layer twice, once for the output and once for the update, and keep those of all
layers in a layout of its own, which it makes and undoes at the borders of a program.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import platform
from pallas_kernels.dispatch import with_gradients_of
from pallas_kernels.lightning_attention import xla

COLUMNS = 64  # of a worker
ROW_BLOCK = 64  # key channels come in blocks of that
MAX_KEY_DIM = 128

_STATE = plgpu.Layout.WGMMA
_KEYS, _VALUES = _STATE.reduce(1), _STATE.reduce(0)


def unsupported(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay_slopes: Float[Array, "H"],
    states: Float[Array, "L B H K V"],
    layer: Int[Array, ""],
    real: Bool[Array, "B"],
    continues: Bool[Array, "B"],
) -> str | None:
    """Why `lightning_decode_step` cannot take these arguments here, or None."""
    del k, v, decay_slopes, layer, real, continues
    return platform.other_than_hopper() or unsupported_arguments(q, states)


def unsupported_arguments(q: jax.Array, states: jax.Array) -> str | None:
    """The part of `unsupported` that does not depend on the machine."""
    key_dim, value_dim = states.shape[3:]
    if states.dtype != jnp.float32 or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype} and {states.dtype}: it keeps states in fp32, of bf16 or fp32"
    if key_dim % ROW_BLOCK or key_dim > MAX_KEY_DIM or value_dim % COLUMNS or 0 in states.shape:
        return (
            f"states of shape {states.shape}: the last two sizes must be multiples of {COLUMNS}, "
            f"that of the keys at most {MAX_KEY_DIM}"
        )
    return None


def lightning_decode_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay_slopes: Float[Array, "H"],
    states: Float[Array, "L B H K V"],
    layer: Int[Array, ""],
    real: Bool[Array, "B"],
    continues: Bool[Array, "B"],
) -> tuple[Float[Array, "B H V"], Float[Array, "L B H K V"]]:
    """`pallas_kernels.lightning_decode_step` of a layer among several; gradients are XLA's."""
    step = with_gradients_of(xla.lightning_decode_step, _decode)
    return step(q, k, v, decay_slopes, states, layer, real, continues)


def _decode(q, k, v, decay_slopes, states, layer, real, continues):
    forgotten = jnp.expm1(-decay_slopes.astype(jnp.float32))
    flags = jnp.stack([real, continues], axis=1).astype(jnp.int32)
    # Within the states whatever is asked for, as XLA has it.
    place = jnp.clip(jnp.reshape(layer, (1,)).astype(jnp.int32), 0, states.shape[0] - 1)
    out, states = _step(q, k, v, forgotten, states, place, flags)
    return out.astype(v.dtype), states


# A program of its own, so that a model with many layers holds and lowers the kernel once.
@jax.jit
def _step(q, k, v, forgotten, states, layer, flags):
    rows, heads, key_dim, value_dim = states.shape[1:]
    spread = functools.partial(lax.broadcast_in_dim, shape=(key_dim, COLUMNS))

    def body(states, q, k, v, forgotten, layer, flags, out):
        row, head, column = (lax.axis_index(name) for name in ("row", "head", "column"))
        columns = pl.ds(column * COLUMNS, COLUMNS)
        target = out.at[row, head, columns]

        def load(ref: Any, layout: Any) -> jax.Array:
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        @pl.when(flags[row, 0] != 0)
        def _():
            state = states.at[layer[0], row, head, :, columns]
            # Chosen, not multiplied by 0: what is not carried on may be NaN.
            carried = jnp.broadcast_to(flags[row, 1] != 0, (key_dim, COLUMNS))
            old = load(state, _STATE)
            old = jnp.where(plgpu.layout_cast(carried, _STATE), old, jnp.zeros_like(old))
            key = spread(load(k.at[row, head], _KEYS), broadcast_dimensions=[0])
            value = spread(load(v.at[row, head, columns], _VALUES), broadcast_dimensions=[1])
            new = old + (forgotten[head] * old + key * value)
            state[...] = new
            query = spread(load(q.at[row, head], _KEYS), broadcast_dimensions=[0])
            target[...] = jnp.sum(query * new, axis=0)

        @pl.when(flags[row, 0] == 0)
        def _():
            target[...] = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), _VALUES)

    kernel: Any = pl.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows, heads, value_dim), jnp.float32),),
        mesh=plgpu.Mesh(
            grid=(value_dim // COLUMNS, heads, rows), grid_names=("column", "head", "row")
        ),
        compiler_params=plgpu.CompilerParams(),
        name="lightning_decode_step",
    )
    held: Any = jax.new_ref(states)
    (out,) = kernel(held, q, k, v, forgotten, layer, flags)
    return out, jax.freeze(held)
