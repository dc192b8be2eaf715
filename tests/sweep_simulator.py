"""`gpu_sweep.run` in plain jax, from its docstring: what the host's bookkeeping is tested with.

The kernel itself runs on Hopper GPUs only (`benchmarks/lightning.py` checks it there).
"""

import math

import jax
import jax.numpy as jnp

CHUNK, CENTRE = 64, 32
RING = 3  # chunks that a sweep for states reads at least


def _rows(sweep, tokens, code):
    """(real, tokens before, limit, tokens of the chunk, limit of its last token), natural order."""
    place = jnp.arange(CHUNK)
    place = place[::-1] if sweep.reverse else place
    whole = jnp.ones(CHUNK, bool), place, jnp.full(CHUNK, -1), jnp.asarray(CHUNK), jnp.asarray(-1)
    special = (tokens >> 16) > 0, (tokens >> 8) & 255, (tokens & 255) - 1
    special = (*special, (code >> 8) & 255, (code & 255) - 1)
    return place, *(jnp.where(code == 0, x, y) for x, y in zip(whole, special, strict=True))


def _segment(sweep, streams, slope, seed, tokens, codes):
    """One segment of one head: streams [arrays, chunks, C, D] -> outputs [chunks, C, D], Z."""

    def chunk(carry, inputs):
        state, _ = carry
        arrays, tokens, code = inputs
        place, real, before, limit, count, edge = _rows(sweep, tokens, code)
        up = jnp.where(real, jnp.exp(slope * (before - CENTRE)), 0)[:, None]
        down = jnp.where(real, jnp.exp(-slope * (before - CENTRE)), 0)[:, None]
        x, y = arrays[sweep.keys], arrays[sweep.values] * up
        sees = (place[None] <= place[:, None]) & (place[None] >= limit[:, None])
        outs = []
        for output in sweep.outputs:
            a = arrays[output.reads]
            against, weighted, carried = (y, x, state.T) if output.transposed else (x, y, state)
            own = jnp.where(sees, a @ against.T, 0) @ weighted
            outs.append(down * (own + jnp.where(limit < 0, 1, 0)[:, None] * (a @ carried)))
        kept = jnp.where((place >= edge)[:, None], y, 0)
        end = jnp.where(edge >= 0, 0, state) + x.T @ kept
        return (jnp.exp(-slope * count) * end, end), outs

    inputs = (jnp.moveaxis(streams, 1, 0), tokens, codes)
    (_, end), outs = jax.lax.scan(chunk, (seed, seed), inputs, reverse=sweep.reverse)
    return outs, end


def run(
    sweeps,
    arrays,
    slopes,
    *,
    seeds=None,
    bookkeeping=None,
    starts=None,
    segments=1,
    splits=1,
    final=False,
    overlap=False,
    interpret=None,
):
    """See `pallas_kernels.lightning_attention.gpu_sweep.run`."""
    batch, length, heads, dim = arrays[0].shape
    chunks = math.ceil(math.ceil(length / segments) / CHUNK)
    total = segments * chunks * CHUNK
    # [B, H, segments, arrays, chunks, C, D]
    streams = jnp.stack([x.astype(jnp.float32) for x in arrays])
    streams = jnp.pad(streams, ((0, 0), (0, 0), (0, total - length), (0, 0), (0, 0)))
    streams = streams.reshape(len(arrays), batch, segments, chunks, CHUNK, heads, dim)
    streams = streams.transpose(1, 5, 2, 0, 3, 4, 6)
    if starts is not None:
        (sweep,) = sweeps
        first = jnp.minimum(starts.reshape(batch, heads, segments), max(chunks - RING, 0))
        order = jnp.arange(chunks)[::-1] if sweep.reverse else jnp.arange(chunks)
        read = order >= first[..., None]
        streams = jnp.where(read[:, :, :, None, :, None, None], streams, 0)
    outs, finals = [], []
    for i, sweep in enumerate(sweeps):
        shape = (batch, heads, segments, dim, dim)
        seed = jnp.zeros(shape) if seeds is None else seeds[i].reshape(shape)
        tokens = jnp.zeros((batch, total), jnp.int32)
        codes = jnp.zeros((batch, segments * chunks), jnp.int32)
        if bookkeeping is not None:
            tokens, codes = bookkeeping[i].tokens, bookkeeping[i].chunks
        tokens = tokens.reshape(batch, segments, chunks, CHUNK)
        codes = codes.reshape(batch, segments, chunks)

        def one(*args, sweep=sweep):
            return _segment(sweep, *args)

        by_segment = jax.vmap(one, in_axes=(0, None, 0, 0, 0))
        by_head = jax.vmap(by_segment, in_axes=(0, 0, 0, None, None))
        made, ends = jax.vmap(by_head, in_axes=(0, None, 0, 0, 0))(
            streams, slopes, seed, tokens, codes
        )
        for out in made:  # [B, H, segments, chunks, C, D]
            out = out.reshape(batch, heads, total, dim).transpose(0, 2, 1, 3)
            outs.append(out[:, :length].astype(arrays[0].dtype))
        ends = ends.reshape(batch * heads, segments, dim, dim)
        finals.append(ends if not sweep.outputs else ends[:, 0 if sweep.reverse else -1])
    return outs + (finals if final else [])
