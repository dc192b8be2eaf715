"""Cases of the three kernels and how to check an implementation on them.

A new backend calls the same `check_*` functions with its name:
    `check_lightning(case, jnp.bfloat16, implementation="mosaic", tolerance=4e-3)`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import truth

from pallas_kernels import grouped_matmul, lightning_attention, softmax_attention

# fp32 rounds at 6e-8; sums of tens of terms in another order stay within thirty of those.
FP32 = 2e-6
# bf16 rounds at 2^-9 = 2e-3, and two such roundings (operand, result) lie between input and output.
BF16 = 4e-3
TOLERANCE = {jnp.float32: FP32, jnp.bfloat16: BF16}


def named(cases):
    """`pytest.mark.parametrize` arguments: the cases, each under its name."""
    return dict(argvalues=cases, ids=lambda case: case.name)


def check_close(seen, wanted, tolerance: float, what: str, axis: int | None = None) -> None:
    """Relative RMS error within tolerance, for each index of `axis` on its own (heads, groups).

    Zero must be exactly zero; shapes must agree and no value may be NaN.
    """
    seen, wanted = np.asarray(seen).astype(np.float64), np.asarray(wanted)
    if seen.shape != wanted.shape:
        raise AssertionError(f"{what}: shape {seen.shape}, not {wanted.shape}")
    parts = [(seen, wanted)]
    if axis is not None:
        both = np.moveaxis(seen, axis, 0), np.moveaxis(wanted, axis, 0)
        parts = list(zip(*both, strict=True))
    for number, (one, true) in enumerate(parts):
        error = np.sqrt(np.sum((one - true) ** 2))
        size = np.sqrt(np.sum(true**2))
        if not error <= tolerance * size:
            raise AssertionError(
                f"{what}[{number}]: relative RMS error {error / max(size, 1e-300):.2e} "
                f"is more than {tolerance:.1e}"
            )


def _normal(rng, shape, dtype):
    """Numbers that the dtype holds exactly, so that the truth starts from the same ones."""
    return jnp.asarray(rng.standard_normal(shape), dtype)


# ---------------------------------------------------------------- lightning attention

CHUNK = 16
# No decay at all, the slowest kind, an ordinary one, the fastest head of layer 0.
SLOPES = (0.0, 1e-4, 0.03, 1.0)


@dataclass(frozen=True)
class LightningCase:
    """`segments` has a row of ids for each batch row; None is one segment and no padding."""

    name: str
    length: int
    initial_state: bool = False
    segments: tuple[tuple[int, ...], ...] | None = None
    key_dim: int = 8
    value_dim: int = 8

    @property
    def batch(self) -> int:
        return 2 if self.segments is None else len(self.segments)


def _runs(*runs: tuple[int, int]) -> tuple[int, ...]:
    """(id, count) pairs as a row of ids."""
    return tuple(i for i, count in runs for _ in range(count))


_PACKED = (
    _runs((1, 5), (2, 11), (3, 1), (4, 33)),  # 11 ends a chunk, 33 spans three
    _runs((7, 16), (2, 16), (9, 18)),  # borders on chunk borders, ids in no order
)
_PADDED = (
    _runs((0, 9), (1, 41)),
    _runs((1, 30), (0, 20)),
    _runs((1, 6), (0, 37), (1, 7)),  # padding longer than a chunk inside one sample
    _runs((0, 50)),
)
_BOTH = (
    _runs((0, 3), (4, 14), (0, 19), (4, 2), (5, 6), (0, 6)),
    tuple(i % 2 for i in range(50)),  # every second token is padding
    _runs((0, 1), (3, 1), (2, 1), (1, 46), (0, 1)),
)
LIGHTNING_CASES = (
    # One token has many channels: over a few numbers a bf16 error would be a matter of luck.
    LightningCase("one_token", 1, key_dim=32, value_dim=32),
    LightningCase("one_token_after_state", 1, initial_state=True, key_dim=32, value_dim=32),
    LightningCase("shorter_than_chunk", 5, initial_state=True),
    LightningCase("chunk_minus_one", CHUNK - 1),
    LightningCase("chunk", CHUNK, initial_state=True),
    LightningCase("chunk_plus_one", CHUNK + 1),
    LightningCase("chunks_and_remainder", 3 * CHUNK + 7, initial_state=True),
    LightningCase("whole_chunks", 4 * CHUNK),
    LightningCase("wide_values", 37, initial_state=True, key_dim=8, value_dim=12),
    LightningCase("wide_keys", 37, initial_state=True, key_dim=12, value_dim=4),
    LightningCase("packed", 50, initial_state=True, segments=_PACKED),
    LightningCase("padded", 50, initial_state=True, segments=_PADDED),
    LightningCase("packed_and_padded", 50, initial_state=True, segments=_BOTH),
    LightningCase("padded_from_zero", 50, segments=_PADDED),
    LightningCase(
        "padding_token",
        1,
        initial_state=True,
        segments=((0,), *((1,),) * 5),
        key_dim=32,
        value_dim=32,
    ),
)


def check_lightning(
    case: LightningCase, dtype, *, implementation: str | None, tolerance: float
) -> None:
    """Output, final state and every gradient, each head by itself, against float64."""
    rng = np.random.default_rng(len(case.name) + case.length)
    shape = (case.batch, case.length, len(SLOPES))
    q = _normal(rng, (*shape, case.key_dim), dtype)
    k = _normal(rng, (*shape, case.key_dim), dtype)
    v = _normal(rng, (*shape, case.value_dim), dtype)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    state_shape = (case.batch, len(SLOPES), case.key_dim, case.value_dim)
    state = _normal(rng, state_shape, jnp.float32) if case.initial_state else None
    ids = None if case.segments is None else jnp.asarray(case.segments, jnp.int32)
    grad_out = _normal(rng, v.shape, dtype)
    grad_final = _normal(rng, state_shape, jnp.float32)

    @jax.jit
    def run(q, k, v, slopes, state, grad_out, grad_final):
        def attend(q, k, v, state):
            return lightning_attention(
                q,
                k,
                v,
                slopes,
                initial_state=state,
                segment_ids=ids,
                chunk_size=CHUNK,
                implementation=implementation,
            )

        results, back = jax.vjp(attend, q, k, v, state)
        return results, back((grad_out, grad_final))

    # The second pass sees a gradient through the final state alone.
    for of_out, what in ((grad_out, "of both"), (jnp.zeros_like(grad_out), "of the state")):
        (out, final), grads = run(q, k, v, slopes, state, of_out, grad_final)
        true = truth.lightning(q, k, v, slopes, state, ids, of_out, grad_final)
        if out.dtype != dtype or final.dtype != jnp.float32:
            raise AssertionError(f"dtypes {out.dtype} and {final.dtype}")
        check_close(out, true.out, tolerance, "output", axis=2)
        check_close(final, true.final_state, tolerance, "final_state", axis=1)
        for grad, wanted, name in zip(grads[:3], true[2:5], "qkv", strict=True):
            check_close(grad, wanted, tolerance, f"gradient {what} to {name}", axis=2)
        if state is not None:
            # Heads together: a head that has forgotten the state passes back rounding alone.
            name = f"gradient {what} to initial_state"
            check_close(grads[3], true.grad_initial_state, tolerance, name)


# ---------------------------------------------------------------- softmax attention


@dataclass(frozen=True)
class SoftmaxCase:
    """`kv_length` None means self-attention over `length` tokens."""

    name: str
    length: int
    kv_length: int | None = None
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    q_offset: int = 0
    segments: tuple[tuple[int, ...], ...] | None = None
    kv_segments: tuple[tuple[int, ...], ...] | None = None
    key_dim: int = 8
    value_dim: int = 8
    scale: float | None = None


SOFTMAX_CASES = (
    SoftmaxCase("one_token", 1),
    SoftmaxCase("one_block", 8),
    SoftmaxCase("blocks_and_remainder", 27),
    SoftmaxCase("not_causal", 19, causal=False),
    SoftmaxCase("one_head_each", 17, heads=3, kv_heads=3, value_dim=5),
    SoftmaxCase("one_key_head", 17, heads=6, kv_heads=1, scale=0.9),
    SoftmaxCase("packed", 50, segments=_PACKED),
    SoftmaxCase("padded", 50, segments=_PADDED),
    SoftmaxCase("packed_not_causal", 50, segments=_BOTH, causal=False),
    SoftmaxCase("step_on_cache", 1, kv_length=21, q_offset=12),
    SoftmaxCase("chunk_on_cache", 11, kv_length=29, q_offset=9),
    SoftmaxCase("chunk_on_full_cache", 11, kv_length=29, q_offset=18),
    SoftmaxCase(
        "packed_chunk_on_cache",
        10,
        kv_length=25,
        q_offset=7,
        segments=(_runs((3, 4), (0, 1), (5, 5)), _runs((0, 2), (4, 8))),
        kv_segments=(
            _runs((2, 3), (3, 8), (0, 1), (5, 5), (0, 8)),
            _runs((0, 9), (4, 8), (0, 8)),
        ),
    ),
    # Every query belongs to a segment that no key has, then to one it has only in the future.
    SoftmaxCase(
        "sees_nothing",
        20,
        segments=(_runs((2, 20)), _runs((1, 20))),
        kv_segments=(_runs((1, 20)), _runs((2, 19), (1, 1))),
    ),
    SoftmaxCase("keys_before_any_query", 9, kv_length=30, causal=True, q_offset=0),
)


def check_softmax(
    case: SoftmaxCase, dtype, *, implementation: str | None, tolerance: float
) -> None:
    """Output, log-sum-exp and the gradients through both, against float64."""
    rng = np.random.default_rng(len(case.name) + case.length)
    batch = 2 if case.segments is None else len(case.segments)
    kv_length = case.length if case.kv_length is None else case.kv_length
    q = _normal(rng, (batch, case.length, case.heads, case.key_dim), dtype)
    k = _normal(rng, (batch, kv_length, case.kv_heads, case.key_dim), dtype)
    v = _normal(rng, (batch, kv_length, case.kv_heads, case.value_dim), dtype)
    grad_out = _normal(rng, (batch, case.length, case.heads, case.value_dim), dtype)
    grad_lse = _normal(rng, (batch, case.length, case.heads), jnp.float32)
    ids, kv_ids = (
        None if segments is None else jnp.asarray(segments, jnp.int32)
        for segments in (case.segments, case.kv_segments)
    )

    @jax.jit
    def run(q, k, v, q_offset, grad_out, grad_lse):
        def attend(q, k, v):
            return softmax_attention(
                q,
                k,
                v,
                causal=case.causal,
                segment_ids=ids,
                kv_segment_ids=kv_ids,
                q_offset=q_offset if case.q_offset else 0,  # traced and not
                scale=case.scale,
                return_lse=True,
                implementation=implementation,
            )

        results, back = jax.vjp(attend, q, k, v)
        return results, back((grad_out, grad_lse))

    (out, lse), grads = run(q, k, v, case.q_offset, grad_out, grad_lse)
    visible = np.ones((batch, case.length, kv_length), bool)
    if ids is not None:
        kv_ids = ids if kv_ids is None else kv_ids
        same = np.asarray(ids)[:, :, None] == np.asarray(kv_ids)[:, None, :]
        visible &= same & (np.asarray(ids) != 0)[:, :, None]
    if case.causal:
        last_seen = case.q_offset + np.arange(case.length)
        visible &= np.arange(kv_length)[None, :] <= last_seen[:, None]
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    true = truth.softmax_attention(q, k, v, visible, scale, grad_out, grad_lse)
    if out.dtype != dtype or lse.dtype != jnp.float32:
        raise AssertionError(f"dtypes {out.dtype} and {lse.dtype}")
    # The heads of a case are alike, so one figure serves them all.
    check_close(out, true.out, tolerance, "output")
    sees = np.isfinite(true.lse)
    np.testing.assert_array_equal(np.asarray(lse)[~sees], -np.inf)
    check_close(np.asarray(lse)[sees], true.lse[sees], tolerance, "lse")
    for grad, wanted, name in zip(grads, true[2:], "qkv", strict=True):
        check_close(grad, wanted, tolerance, f"gradient to {name}")


# ---------------------------------------------------------------- grouped matmul


@dataclass(frozen=True)
class GroupedCase:
    """`rows` beyond the sum of `group_sizes` belong to no group."""

    name: str
    rows: int
    group_sizes: tuple[int, ...]
    inner: int = 8
    columns: int = 12


GROUPED_CASES = (
    GroupedCase("one_group", 13, (13,)),
    GroupedCase("even_groups", 64, (16, 16, 16, 16)),
    GroupedCase("ragged", 64, (1, 30, 7, 26)),
    GroupedCase("empty_groups", 40, (0, 17, 0, 0, 23, 0)),
    GroupedCase("rows_past_the_end", 40, (5, 0, 12)),
    GroupedCase("all_in_last", 33, (0, 0, 0, 33)),
    GroupedCase("all_groups_empty", 12, (0, 0, 0)),
    GroupedCase("fewer_rows_than_groups", 3, (0, 1, 0, 0, 1, 0, 1, 0, 0, 0)),
    GroupedCase("one_row", 1, (0, 0, 1, 0)),
    GroupedCase("longer_than_a_block", 1300, (700, 41, 559), inner=4, columns=4),
    GroupedCase("skewed", 300, (*(0,) * 9, 1, 290, *(0,) * 4, 3), inner=4, columns=4),
)


def check_grouped(
    case: GroupedCase, dtype, *, implementation: str | None, tolerance: float
) -> None:
    """Output and both gradients against float64."""
    rng = np.random.default_rng(len(case.name) + case.rows)
    x = _normal(rng, (case.rows, case.inner), dtype)
    w = _normal(rng, (len(case.group_sizes), case.inner, case.columns), dtype)
    grad_out = _normal(rng, (case.rows, case.columns), dtype)

    @jax.jit
    def run(x, w, group_sizes, grad_out):
        def multiply(x, w):
            return grouped_matmul(x, w, group_sizes, implementation=implementation)

        out, back = jax.vjp(multiply, x, w)
        return out, back(grad_out)

    out, (grad_x, grad_w) = run(x, w, jnp.asarray(case.group_sizes, jnp.int32), grad_out)
    true_out, true_x, true_w = truth.grouped_matmul(x, w, case.group_sizes, grad_out)
    if out.dtype != dtype:
        raise AssertionError(f"dtype {out.dtype}")
    check_close(out, true_out, tolerance, "output")
    check_close(grad_x, true_x, tolerance, "gradient to x")
    check_close(grad_w, true_w, tolerance, "gradient to w", axis=0)
