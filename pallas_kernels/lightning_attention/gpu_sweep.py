"""The sweep: one Hopper kernel that is the forward and the backward pass of lightning attention.

A sweep walks chunks of C tokens in time order, or against it. It carries a D x D state built from
two streams, keys x and values y, and makes outputs from the state and the chunk. With m the number
of tokens the chunk has processed before a token, c = C / 2, s the slope, N the tokens of the chunk:

    y'_j  = e^{s (m_j - c)} y_j
    plain       out_i = e^{-s (m_i - c)} (a_i U   + sum_j [i sees j] (a_i . x_j) y'_j)
    transposed  out_i = e^{-s (m_i - c)} (a_i U^T + sum_j [i sees j] (a_i . y'_j) x_j)
    Z = U + x^T y'        U <- e^{-s N} Z

    forward   o       x=k, y=v,  plain from q
    backward  dq      x=k, y=v,  transposed from do
              dv, dk  x=q, y=do, plain from k, transposed from v, against time: one state

The decay rides on one operand, so there is no C x C decay matrix; exponents stay within s C / 2.
The state leaves as Z, before the last decay, so nothing has to be undone.

A block (CTA) has three warpgroups by role: one advances the state and publishes it in bf16, one
makes outputs, one moves memory (TMA). Splitting the work by role rather than by columns keeps the
state's serial chain short, which is what limits the kernel when there are few heads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.lightning_attention import gpu_roles
from pallas_kernels.lightning_attention.gpu_roles import CHUNK, Block, Launch, Refs, Sweep, untyped

WARPGROUPS = 3
STATE, OUTPUT, MEMORY = range(WARPGROUPS)
# Registers a thread by role. All three must be set, or ptxas ignores them and spills.
REGISTERS = {STATE: 232, OUTPUT: 232, MEMORY: 40}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bookkeeping:
    """Packed samples and padding of one sweep, in int32; None of it for plain rows.

    A chunk without a border or padding is *plain* and runs as if there were no bookkeeping.

    Attributes:
      tokens: [B, T'] see `pack_token`.
      chunks: [B, T' / C] 0 for a plain chunk, else see `pack_chunk`.
    """

    tokens: Array
    chunks: Array


def pack_token(real, before, limit):
    """Whether a token is real, and what its chunk did before it.

    `before` counts the real tokens processed before it, `limit` is where its sample begins in the
    chunk, in processing order; -1 if that is in an earlier chunk.
    """
    return real.astype(jnp.int32) << 16 | before << 8 | (limit + 1)


def pack_chunk(plain, count, limit):
    """0 if plain; else 1, the real tokens of the chunk, and the `limit` of its last token."""
    return jnp.where(plain, 0, 1 << 16 | count << 8 | (limit + 1)).astype(jnp.int32)


# A program of its own, so that a model with many layers holds and lowers each kernel once.
@functools.partial(
    jax.jit, static_argnames=("sweeps", "segments", "splits", "final", "overlap", "interpret")
)
def run(
    sweeps: tuple[Sweep, ...],
    arrays: Sequence[Array],
    slopes: Array,
    *,
    seeds: Sequence[Array] | None = None,
    bookkeeping: Sequence[Bookkeeping] | None = None,
    starts: Array | None = None,
    segments: int = 1,
    splits: int = 1,
    final: bool = False,
    overlap: bool = False,
    interpret: Any = None,
) -> list[Array]:
    """Run sweeps over the same rows in one launch.

    Args:
      sweeps: they share the launch; with `splits` > 1 each makes one output.
      arrays: bf16 [B, T, H, D], D 64 or 128, T a multiple of 64 unless there is bookkeeping.
      slopes: fp32 [H].
      seeds: for each sweep the state U that enters each segment, fp32 [B H, segments, D, D].
      bookkeeping: for each sweep; covers segments x ceil(T / segments / 64) x 64 tokens.
      starts: of a sweep without outputs, int32 [B H, segments]: the chunk of each segment, counted
        as they are processed, at which it begins; no later than the last that fill its ring.
      segments: equal pieces the rows are cut into, each a block of its own.
      splits: blocks that share the columns of an output.
      final: also return end states Z: [B H, D, D] or, without outputs, [B H, segments, D, D] that
        are exact to fp32; beside outputs they have the rounding of the scaled values in them.
      overlap: mask the scores under the product with the state; pays off in the backward pass.
      interpret: parameters of the GPU interpreter, to run on a CPU.

    Returns:
      The outputs sweep by sweep, bf16 like the arrays; then the end states, fp32.
    """
    batch, length, heads, dim = arrays[0].shape
    chunks = math.ceil(math.ceil(length / segments) / CHUNK)
    launch = Launch(
        sweeps=tuple(sweeps),
        heads=heads,
        dim=dim,
        splits=splits,
        segments=segments,
        chunks=chunks,
        slots=3 if splits > 1 or not sweeps[0].outputs else 2,
        state_slots=2,
        seeded=seeds is not None,
        tracked=bookkeeping is not None,
        final=final,
        overlap=overlap,
    )
    outputs = [
        jax.ShapeDtypeStruct(arrays[0].shape, jnp.bfloat16) for s in sweeps for _ in s.outputs
    ]
    if final:
        shape = (batch * heads, dim, dim)
        if not launch.max_outputs:
            shape = (batch * heads, segments, dim, dim)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(sweeps)
    tracked = [x for b in bookkeeping or () for x in (b.tokens, b.chunks)]
    assert starts is None or not launch.max_outputs, "outputs would be left out"
    late = [] if starts is None else [starts]
    inputs = (*arrays, slopes, *late, *(seeds or ()), *tracked)
    kernel = plgpu.kernel(
        functools.partial(_entry, launch, len(arrays), bool(late), len(inputs), len(outputs)),
        out_type=outputs,
        grid=(len(sweeps), batch * heads, segments, splits),
        grid_names=("sweep", "batch_head", "segment", "split"),
        num_threads=WARPGROUPS,
        thread_name="role",
        kernel_name="lightning_attention",
        scratch_types=_scratch(launch),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(*inputs)


def _scratch(launch: Launch) -> list[Any]:
    """Shared buffers (keys, values, reads, state, staged outputs, rest), then barriers a sweep."""
    keys, values = launch.state_shape

    def buffer(*shape: int):
        transforms = (untyped.TilingTransform((8, 64)), untyped.SwizzleTransform(128))
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    unused = plgpu.SMEM((1, 8, 64), jnp.bfloat16)
    number = launch.max_outputs
    scratch: list[Any] = [
        buffer(launch.slots, CHUNK, keys),
        buffer(launch.slots, CHUNK, values),
        [buffer(launch.slots, CHUNK, launch.dim) for _ in range(number)],
        buffer(launch.state_slots, keys, values) if number else unused,
        buffer(number, CHUNK, launch.columns) if number else unused,
        [buffer(CHUNK, values)] if launch.exact else [],
    ]
    for sweep in launch.sweeps:
        makes = bool(sweep.outputs)
        scratch += [
            plgpu.Barrier(num_arrivals=2 + len(sweep.outputs), num_barriers=launch.slots),
            plgpu.Barrier(num_arrivals=launch.state_parts + makes, num_barriers=launch.slots),
            plgpu.Barrier(num_barriers=launch.state_slots),
            plgpu.Barrier(num_barriers=launch.state_slots),
            plgpu.Barrier(),
        ]
    return scratch


def _entry(
    launch: Launch, num_arrays: int, late: bool, num_inputs: int, num_outputs: int, *refs
) -> None:
    """Find this block's sweep and warpgroup, and go."""
    inputs, refs = refs[:num_inputs], refs[num_inputs:]
    outputs, scratch = refs[:num_outputs], refs[num_outputs:]
    buffers, barriers = scratch[:6], scratch[6:]
    role, sweep_id, batch_head, segment, split = (
        lax.axis_index(name) for name in ("role", "sweep", "batch_head", "segment", "split")
    )
    batch = lax.div(batch_head, jnp.int32(launch.heads))
    head = lax.rem(batch_head, jnp.int32(launch.heads))
    extra = inputs[num_arrays + 1 + late :]
    number = len(launch.sweeps)
    seeds, tracked = (extra[:number], extra[number:]) if launch.seeded else ((), extra)
    made = 0
    for i, sweep in enumerate(launch.sweeps):
        block = Block(batch, head, batch_head, segment, split, launch, sweep)
        own = Refs(
            inputs[:num_arrays],
            inputs[num_arrays],
            seeds[i] if seeds else None,
            tracked[2 * i] if tracked else None,
            tracked[2 * i + 1] if tracked else None,
            inputs[num_arrays + 1] if late else None,
            outputs[made : made + len(sweep.outputs)],
            outputs[num_outputs - number + i] if launch.final else None,
            *buffers,
            *barriers[5 * i : 5 * i + 5],
        )
        made += len(sweep.outputs)
        _start(block, own, role, None if number == 1 else sweep_id == i)


def _start(block: Block, refs: Refs, role, mine) -> None:
    """Hand each warpgroup its role, with the registers it needs."""
    work = {
        STATE: gpu_roles.advance_state,
        OUTPUT: gpu_roles.make_outputs,
        MEMORY: gpu_roles.move_memory,
    }
    for which, function in work.items():
        part = 0
        if which == OUTPUT and not block.sweep.outputs:
            if block.launch.state_parts == 1:
                continue
            part, function = 1, gpu_roles.advance_state
        here = role == which
        if mine is not None:
            here &= mine

        @pl.when(here)
        def _(which=which, function=function, part=part):
            if block.launch.max_outputs:
                action = "decrease" if which == MEMORY else "increase"
                plgpu.set_max_registers(REGISTERS[which], action=action)
            function(dataclasses.replace(block, part=part), refs)
