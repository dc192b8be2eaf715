"""The public functions of lightning attention: argument checks and the choice of implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention import gpu_decode, gpu_hopper, reference, tpu, xla

IMPLEMENTATIONS = (
    dispatch.Implementation(
        "pallas_gpu", gpu_hopper.lightning_attention, unsupported=gpu_hopper.unsupported
    ),
    dispatch.Implementation("pallas_tpu", tpu.lightning_attention, unsupported=tpu.unsupported),
    dispatch.Implementation("xla", xla.lightning_attention),
    dispatch.Implementation("reference", reference.lightning_attention, automatic=False),
)
STATE_IMPLEMENTATIONS = (
    dispatch.Implementation(
        "pallas_gpu", gpu_hopper.lightning_state, unsupported=gpu_hopper.unsupported_state
    ),
    dispatch.Implementation("xla", xla.lightning_state),
)
DECODE_IMPLEMENTATIONS = (
    dispatch.Implementation(
        "pallas_gpu", gpu_decode.lightning_decode_step, unsupported=gpu_decode.unsupported
    ),
    dispatch.Implementation("xla", xla.lightning_decode_step),
)
DEFAULT_CHUNK_SIZE = 256


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Causal linear attention with a fixed decay per head (MiniMax-01 paper, section 2.2).

        S_t = exp(-s_h) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

    There is no softmax, no scaling by 1/sqrt(K), and the current token is not decayed.

    A token with segment id 0 is padding: it neither reads, writes nor decays the state and its
    output is 0, so the result is that of the row with its padding removed. Wherever the id changes
    from one real token to the next the state restarts from zero. `initial_state` belongs to the
    segment of the first real token, `final_state` to that of the last.

    Args:
      q, k, v: bf16 or fp32; T is any length >= 1.
      decay_slopes: fp32 >= 0; head h forgets by exp(-decay_slopes[h]) a token. Gets no gradient.
      initial_state: fp32; zeros when None.
      segment_ids: ids of packed samples, each one contiguous run; None means one segment a row.
      chunk_size: tokens handled at once by chunked implementations (256 when None). It changes the
        speed, and the result only by rounding.
      implementation: 'pallas_gpu', 'pallas_tpu', 'xla', 'reference'; None is the best available.

    Returns:
      The output in the dtype of `v`, and the final state in fp32.

    Raises:
      ValueError: shapes that disagree, a dtype that is not floating, negative slopes.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "lightning_attention"
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"{name}: q has shape {q.shape}; it must be [B, T, H, K], none of them 0")
    batch, length, heads, key_dim = q.shape
    dispatch.require_shape(name, "k", k, q.shape)
    dispatch.require_shape(name, "v", v, (batch, length, heads, max((1, *v.shape[-1:]))))
    _check_slopes(name, decay_slopes, heads)
    dispatch.require_one_dtype(name, q=q, k=k, v=v)
    if initial_state is not None:
        wanted = (batch, heads, key_dim, v.shape[3])
        dispatch.require_shape(name, "initial_state", initial_state, wanted)
    if segment_ids is not None:
        dispatch.require_shape(name, "segment_ids", segment_ids, (batch, length))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size is {chunk_size}; it must be at least 1")
    arguments = dict(
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=min(length, chunk_size or DEFAULT_CHUNK_SIZE),
    )
    decay_slopes = jax.lax.stop_gradient(decay_slopes)
    chosen = dispatch.select(
        name, IMPLEMENTATIONS, implementation, q, k, v, decay_slopes, **arguments
    )
    with jax.named_scope("attend"):
        return chosen.call(q, k, v, decay_slopes, **arguments)


def lightning_state(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay_slopes: Float[Array, "H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H K V"]:
    """The final state of `lightning_attention`, begun at zero and without the output.

    Args:
      k, v, decay_slopes, segment_ids, chunk_size: see `lightning_attention`.
      reverse: the state that the rows leave when they are read from their end.
      implementation: 'pallas_gpu', 'xla'; None is the best available.

    Returns:
      The state in fp32. 'pallas_gpu' does not read whole chunks of tokens that have decayed below
      e^-88 in it.

    Raises:
      ValueError, NotImplementedError: as `lightning_attention`.
    """
    name = "lightning_state"
    if k.ndim != 4 or 0 in k.shape:
        raise ValueError(f"{name}: k has shape {k.shape}; it must be [B, T, H, K], none of them 0")
    dispatch.require_shape(name, "v", v, (*k.shape[:3], max((1, *v.shape[-1:]))))
    _check_slopes(name, decay_slopes, k.shape[2])
    dispatch.require_one_dtype(name, k=k, v=v)
    if segment_ids is not None:
        dispatch.require_shape(name, "segment_ids", segment_ids, k.shape[:2])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size is {chunk_size}; it must be at least 1")
    arguments = dict(
        segment_ids=segment_ids,
        reverse=reverse,
        chunk_size=min(k.shape[1], chunk_size or DEFAULT_CHUNK_SIZE),
    )
    decay_slopes = jax.lax.stop_gradient(decay_slopes)
    chosen = dispatch.select(
        name, STATE_IMPLEMENTATIONS, implementation, k, v, decay_slopes, **arguments
    )
    with jax.named_scope("attend"):
        return chosen.call(k, v, decay_slopes, **arguments)


def lightning_decode_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay_slopes: Float[Array, "H"],
    state: Float[Array, "B H K V"] | Float[Array, "L B H K V"],
    *,
    layer: int | Int[Array, ""] | None = None,
    real: Bool[Array, "B"] | None = None,
    continues: Bool[Array, "B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], jax.Array]:
    """One token of lightning attention: update the fp32 state, read it.

    The update is written S + (expm1(-s) S + k v^T): rounding exp(-s) to fp32 first would lose the
    decay of the slowest heads over long decodes. Donate `state` where you jit this.

    Args:
      q, k, v: of the token.
      decay_slopes: positive, one a head.
      state: of one layer, or of all layers, of which one is updated in place.
      layer: which one, in the second case and only then.
      real: rows that have a token; the others keep every bit of their state and give 0. None: all.
      continues: rows that carry on their state; the others begin at zero. None: all.
      implementation: 'pallas_gpu' (Hopper), 'xla', or None: 'pallas_gpu' for a layer among several
        where it takes these arguments.

    Returns:
      The output in the dtype of `v`, and the new state, or states, in fp32.

    Raises:
      ValueError: shapes that disagree, a dtype that is not floating, negative slopes.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "lightning_decode_step"
    if q.ndim != 3:
        raise ValueError(f"{name}: q has shape {q.shape}; it must be [B, H, K]")
    dispatch.require_shape(name, "k", k, q.shape)
    dispatch.require_shape(name, "v", v, (*q.shape[:2], max((1, *v.shape[-1:]))))
    leading = () if layer is None else state.shape[:1]
    dispatch.require_shape(name, "state", state, (*leading, *q.shape, v.shape[2]))
    dispatch.require_one_dtype(name, q=q, k=k, v=v)
    dispatch.require_floating(name, state=state)
    _check_slopes(name, decay_slopes, q.shape[1])
    everywhere = jnp.ones(q.shape[0], bool)
    real, continues = (everywhere if rows is None else rows for rows in (real, continues))
    for what, rows in (("real", real), ("continues", continues)):
        dispatch.require_shape(name, what, rows, q.shape[:1])
    states = state[None] if layer is None else state
    if layer is None and implementation is None:
        implementation = "xla"  # of one layer alone it makes one pass, too, and a faster one
    arrays = (
        q,
        k,
        v,
        decay_slopes,
        states,
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        real,
        continues,
    )
    chosen = dispatch.select(name, DECODE_IMPLEMENTATIONS, implementation, *arrays)
    with jax.named_scope("attend"):
        out, states = chosen.call(*arrays)
    return out, states[0] if layer is None else states


def _check_slopes(name: str, decay_slopes: jax.Array, heads: int) -> None:
    dispatch.require_shape(name, "decay_slopes", decay_slopes, (heads,))
    values = dispatch.concrete(decay_slopes)
    if values is not None and values.min() < 0:
        raise ValueError(
            f"{name}: decay_slopes has the negative value {values.min()}; "
            "slopes are >= 0 (the state is multiplied by exp(-slope) at each token)"
        )
