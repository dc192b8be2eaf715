"""Paged attention on GPUs, many queries: cuDNN's primitive simulated by its definition."""

import functools

import cudnn_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check_close
from test_paged_attention import attend, bits, case, truth
from test_paged_attention_gpu import MODELS, arguments

from pallas_kernels import platform
from pallas_kernels.paged_attention import gpu_cudnn

# bf16 rounds at 2^-9 = 2e-3: the weights, and the result of every block before merging.
TOLERANCE = 4e-3


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU whose cuDNN is the simulator, which gives NaN where nothing is promised."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    primitive = "_dot_product_attention_fwd_p_wrapper"
    monkeypatch.setattr(gpu_cudnn.cudnn_calls.cudnn, primitive, cudnn_simulator.Forward())
    monkeypatch.setattr(gpu_cudnn, "MAX_BLOCK", 32)
    yield
    jax.clear_caches()


def chunks(length, *spans):
    """Positions of (start, count) of each row, and padding."""
    return [[*range(start, start + count), *[-1] * (length - count)] for start, count in spans]


CONSECUTIVE = chunks(12, (0, 12), (70, 12), (33, 5), (0, 0), (32, 7), (31, 1), (0, 1))
SHAPES = [
    dict(heads=6, kv_heads=2, dim=16, slots=8),  # blocks of 32 keys
    dict(heads=4, kv_heads=4, dim=8, slots=5),  # of 30
]


@pytest.mark.parametrize("page_dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_definition(shape, page_dtype, simulated):
    """Slots beyond a row's last key hold NaN, entries of the table there are no pages."""
    arrays = case(CONSECUTIVE, **shape, dtype=jnp.bfloat16, page_dtype=page_dtype)
    out = attend(*arrays, implementation="cudnn")
    check_close(out, truth(*arrays), TOLERANCE, "output")
    assert np.all(np.asarray(out)[np.asarray(arrays[-1]) < 0] == 0)


OTHERS = {
    "falling": [[5, 4, 3]],
    "a hole": [[3, 5, 6]],
    "padding first": [[-1, 3, 4]],
    "padding inside": [[3, -1, 4]],
    "one row of two": [[3, 4, 5], [3, 4, 4]],
}


@pytest.mark.parametrize("positions", OTHERS.values(), ids=OTHERS)
def test_other_positions_are_noticed(positions):
    assert not gpu_cudnn._spans(jnp.asarray(positions), 100).consecutive


def test_consecutive_positions_are_noticed():
    spans = gpu_cudnn._spans(jnp.asarray(CONSECUTIVE), 82)
    assert spans.consecutive
    assert spans.starts.tolist() == [0, 70, 33, 0, 32, 31, 0]
    assert spans.counts.tolist() == [12, 12, 5, 0, 7, 1, 1]
    assert not gpu_cudnn._spans(jnp.asarray(CONSECUTIVE), 81).consecutive  # past the table


def test_other_positions_take_the_xla_form(simulated):
    arrays = case([[40, 3, 41, -1]], **SHAPES[0], dtype=jnp.bfloat16)
    out = attend(*arrays, implementation="cudnn")
    assert np.array_equal(bits(out), bits(attend(*arrays, implementation="xla")))


def test_blocks_follow_the_positions_in_one_program(simulated, monkeypatch):
    visited, programs = [], []

    def gather(*args, original=gpu_cudnn.gather):
        jax.debug.callback(lambda: visited.append(1))
        return original(*args)

    monkeypatch.setattr(gpu_cudnn, "gather", gather)

    @jax.jit
    def program(*arrays):
        programs.append(1)
        return gpu_cudnn.paged_attention(*arrays, scale=1.0)

    *arrays, _ = case([[0] * 4], heads=1, kv_heads=1, dim=8, slots=8, dtype=jnp.bfloat16)
    arrays[-1] = jnp.zeros((1, 20), jnp.int32)
    for start, count, blocks in [
        (0, 0, 0),
        (0, 4, 0),
        (1, 4, 1),
        (32, 2, 1),
        (33, 4, 2),
        (96, 4, 3),
    ]:
        visited.clear()
        jax.block_until_ready(program(*arrays, jnp.asarray(chunks(4, (start, count)))))
        jax.effects_barrier()
        assert len(visited) == 2 * blocks, start  # keys and values
    assert len(programs) == 1


def test_a_block_stays_within_its_bytes():
    for config in MODELS.values():
        for rows in (1, 8, 64):
            _, pages, _, table, _ = arguments(config, rows, 1, 1 << 20)
            number = gpu_cudnn._pages_per_block(rows, pages.shape, table.shape[1])
            row_bytes = number * 256 * config.num_kv_heads * config.head_dim * 2 * 2
            assert 128 << 20 <= rows * row_bytes <= 256 << 20 or number * 256 == 32_768
    assert gpu_cudnn._pages_per_block(1, (9, 256, 8, 128), 3) == 3


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_program_for_cuda_calls_cudnn(config):
    arrays = arguments(config, 1, 8192, 1 << 20)
    program = jax.jit(functools.partial(gpu_cudnn.paged_attention, scale=0.1))
    text = program.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 2  # a block, and the chunk's own keys


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (jnp.zeros((1, 0, 4, 8), jnp.bfloat16), "empty queries, of shape (1, 0, 4, 8)"),
        (jnp.zeros((1, 3, 4, 8), jnp.float32), "dtype float32: it must be bfloat16"),
        (jnp.zeros((1, 3, 4, 136), jnp.bfloat16), "head size 136"),
        (jax.ShapeDtypeStruct((64, 8192, 64, 128), jnp.bfloat16), "offsets have 32 bits"),
    ],
)
def test_refusals(q, reason, simulated):
    pages = jax.ShapeDtypeStruct((3, 16, 2, q.shape[3]), q.dtype)
    seen = gpu_cudnn.unsupported(q, pages, pages, None, None, scale=1.0)
    assert seen is not None
    assert reason in seen
