"""The public function of softmax attention: argument checks and the choice of implementation."""

import math

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.softmax_attention import gpu_cudnn, reference, tpu, xla

IMPLEMENTATIONS = (
    dispatch.Implementation("cudnn", gpu_cudnn.softmax_attention, gpu_cudnn.unsupported),
    dispatch.Implementation("pallas_tpu", tpu.softmax_attention, tpu.unsupported),
    dispatch.Implementation("xla", xla.softmax_attention),
    dispatch.Implementation("reference", reference.softmax_attention, automatic=False),
)
BLOCK_IMPLEMENTATIONS = (
    dispatch.Implementation(
        "cudnn", gpu_cudnn.attention_block_backward, gpu_cudnn.block_unsupported
    ),
    dispatch.Implementation("pallas_tpu", tpu.attention_block_backward, tpu.block_unsupported),
    dispatch.Implementation("xla", xla.attention_block_backward),
)


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Grouped-query attention: query head h reads key/value head h // (H / G).

        out_t = sum_s softmax_s(scale q_t . k_s) v_s    over the keys s that t may see

    Query t sees key s if their segment ids are equal and not 0 and, when causal, if s <= t +
    q_offset. A query that sees nothing (padding) gives 0 and a log-sum-exp of -inf.
    The softmax runs in fp32; keys and values are never repeated.

    Args:
      q, k, v: bf16 or fp32, H a multiple of G. S differs from T when reading a cache.
      segment_ids: ids of the queries; 0 is padding; None means all 1.
      kv_segment_ids: ids of the keys; None means those of the queries if S == T, else all 1.
      q_offset: index among the keys of the first query; a traced scalar is fine.
      scale: 1/sqrt(K) when None.
      return_lse: also return log sum_s exp(scale q_t . k_s), fp32, natural logarithm.
      implementation: 'cudnn' (NVIDIA, bf16), 'pallas_tpu', 'xla', 'reference', or None for the
        best that takes these arguments.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "softmax_attention"
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"{name}: q and k have shapes {q.shape} and {k.shape}; "
            "they must be [B, T, H, K] and [B, S, G, K]"
        )
    batch, length, heads, key_dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    dispatch.require_shape(name, "k", k, (batch, kv_length, kv_heads, key_dim))
    dispatch.require_shape(name, "v", v, (batch, kv_length, kv_heads, max((1, *v.shape[-1:]))))
    if heads % kv_heads:
        raise ValueError(f"{name}: {heads} query heads are no multiple of {kv_heads} key heads")
    dispatch.require_one_dtype(name, q=q, k=k, v=v)
    if segment_ids is not None:
        dispatch.require_shape(name, "segment_ids", segment_ids, (batch, length))
        if kv_segment_ids is None and kv_length == length:
            kv_segment_ids = segment_ids
    if kv_segment_ids is not None:
        dispatch.require_shape(name, "kv_segment_ids", kv_segment_ids, (batch, kv_length))
    arguments = dict(causal=causal, scale=1 / math.sqrt(key_dim) if scale is None else float(scale))
    arrays = (q, k, v, segment_ids, kv_segment_ids, q_offset)
    chosen = dispatch.select(name, IMPLEMENTATIONS, implementation, *arrays, **arguments)
    with jax.named_scope("attend"):
        out, lse = chosen.call(*arrays, **arguments)
    return (out, lse) if return_lse else out


def attention_block_backward(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    grad_out: Float[Array, "B T H V"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """What one block of keys contributes to the gradients of q, k and v (ring attention).

    `out` and `lse` are those of the whole attention, merged over all blocks; the other arguments
    are as in `softmax_attention`, of this block. The first result summed over the blocks is the
    gradient of q; the other two are complete for this block's keys.

    Raises:
      ValueError: shapes or dtypes that disagree.
      NotImplementedError: a named implementation that cannot take these arguments.
    """
    name = "attention_block_backward"
    batch, length, heads, key_dim = q.shape
    dispatch.require_shape(name, "k", k, (batch, *k.shape[1:3], key_dim))
    dispatch.require_shape(name, "v", v, (*k.shape[:3], *v.shape[-1:]))
    dispatch.require_shape(name, "out", out, (batch, length, heads, *v.shape[-1:]))
    dispatch.require_shape(name, "grad_out", grad_out, out.shape)
    dispatch.require_shape(name, "lse", lse, (batch, length, heads))
    dispatch.require_one_dtype(name, q=q, k=k, v=v, out=out, grad_out=grad_out)
    if kv_segment_ids is None and k.shape[1] == length:
        kv_segment_ids = segment_ids
    arrays = (q, k, v, out, lse, grad_out, segment_ids, kv_segment_ids, q_offset)
    static = dict(causal=causal, scale=1 / math.sqrt(key_dim) if scale is None else float(scale))
    chosen = dispatch.select(name, BLOCK_IMPLEMENTATIONS, implementation, *arrays, **static)
    with jax.named_scope("attend"):
        return chosen.call(*arrays, **static)
