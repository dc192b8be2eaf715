"""cuDNN's two attention primitives by their definition: what they read, and garbage elsewhere."""

import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.softmax_attention import cudnn_calls, reference, xla

cudnn = cudnn_calls.cudnn


def install(monkeypatch) -> None:
    """Until the end of the test: a Hopper GPU whose cuDNN is this one."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    for name, simulator in (("fwd", Forward()), ("bwd", Backward())):
        monkeypatch.setattr(cudnn, f"_dot_product_attention_{name}_p_wrapper", simulator)


class Forward:
    def bind(self, *operands, scale, mask_type, **parameters):
        q, k, v = operands[:3]
        ids, kv_ids = _ids(*operands, mask_type=mask_type)
        causal = _causal(mask_type)
        out, lse = reference.softmax_attention(q, k, v, ids, kv_ids, 0, causal=causal, scale=scale)
        out = jnp.where((ids == 0)[..., None, None], jnp.nan, out)
        lse = jnp.where((ids == 0)[..., None], jnp.nan, lse)
        if operands[6].ndim < 2:
            return out, jnp.moveaxis(lse, 1, 2)
        sample, position, shape = _places(*operands)
        statistics = jnp.full(shape, jnp.nan).at[sample, :, position].set(lse, mode="drop")
        return out, statistics


class Backward:
    def bind(self, *operands, scale, mask_type, **parameters):
        *operands, statistics, out, grad_out = operands
        q, k, v = operands[:3]
        ids, kv_ids = _ids(*operands, mask_type=mask_type)
        if operands[6].ndim < 2:
            lse = jnp.moveaxis(statistics, 1, 2)
        else:
            sample, position, shape = _places(*operands)
            lse = statistics[jnp.minimum(sample, shape[0] - 1), :, position]
        lse = jnp.where(lse >= cudnn_calls.NOTHING_SEEN, -jnp.inf, lse)
        gradients = xla.attention_block_backward(
            q, k, v, out, lse, grad_out, ids, kv_ids, 0, causal=_causal(mask_type), scale=scale
        )
        garbage = ((ids == 0), (kv_ids == 0), (kv_ids == 0))
        return tuple(
            jnp.where(where[..., None, None], jnp.nan, x)
            for x, where in zip(gradients, garbage, strict=True)
        )


def _causal(mask_type) -> bool:
    return mask_type in (cudnn.MaskType.CAUSAL, cudnn.MaskType.PADDING_CAUSAL)


def _ids(q, k, v, bias, q_length, kv_length, q_begins, kv_begins, *unused, mask_type):
    """1, 2, ... for the samples of each row, 0 where there is none."""
    rows = (jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    if not cudnn.has_padding(mask_type):
        return tuple(jnp.ones((q.shape[0], len(row)), jnp.int32) for row in rows)
    if q_begins.ndim < 2:
        lengths = (q_length, kv_length)
        return tuple(
            (row < length[:, None]).astype(jnp.int32)
            for row, length in zip(rows, lengths, strict=True)
        )
    assert q_begins.shape[1] > 2, "with one sample a row jax ignores where it begins"
    samples = jnp.arange(1, q_length.shape[1] + 1)[:, None]
    sides = zip(rows, (q_begins, kv_begins), (q_length, kv_length), strict=True)
    ids = []
    for row, begins, length in sides:
        begins = begins[:, :-1, None]
        inside = (row >= begins) & (row < begins + length[..., None]) & (begins >= 0)
        ids.append(jnp.sum(jnp.where(inside, samples, 0), axis=1))
    return tuple(ids)


def _places(q, k, v, bias, q_length, kv_length, q_begins, kv_begins, *unused):
    """Where the statistics of each token lie, [sample of the batch, head, token of the sample]."""
    batch, limit = q_length.shape
    shape = (batch * limit, q.shape[2], q.shape[1])
    operands = (q, k, v, bias, q_length, kv_length, q_begins, kv_begins)
    ids, _ = _ids(*operands, mask_type=cudnn.MaskType.PADDING)
    numbers = jnp.sum(q_length >= 0, axis=1)
    before = jnp.cumsum(numbers) - numbers
    sample = jnp.where(ids == 0, shape[0], before[:, None] + ids - 1)
    begin = jnp.take_along_axis(q_begins, jnp.maximum(ids - 1, 0), axis=1)
    return sample, jnp.arange(q.shape[1]) - begin, shape
