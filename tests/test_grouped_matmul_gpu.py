import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import GroupedCase, check_grouped, named

from pallas_kernels import grouped_matmul, platform
from pallas_kernels.grouped_matmul import gpu_hopper

# Tiles of 128 x 256, slots and chunks of 64, copies from rows of 8: borders on and off all.
CASES = (
    GroupedCase("even", 256, (128, 128), inner=128, columns=128),
    GroupedCase("ragged", 200, (1, 0, 7, 65, 127), inner=128, columns=128),
    GroupedCase("rows_past_the_end", 136, (3, 0, 90), inner=128, columns=128),
    GroupedCase("rows_no_multiple_of_8", 77, (30, 47), inner=128, columns=128),
    GroupedCase("few_rows", 5, (0, 2, 1, 2), inner=128, columns=128),
    GroupedCase("all_groups_empty", 16, (0, 0), inner=128, columns=128),
    GroupedCase("several_tiles", 300, (290, 10), inner=128, columns=384),
)
TOLERANCE = 4e-3  # rounding of the results to bf16


@pytest.fixture
def interpreted(monkeypatch):
    """A Hopper GPU of two multiprocessors, interpreted on the CPU."""
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(platform, "gpu_cores", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=False)):
        yield


@pytest.mark.parametrize("case", **named(CASES))
def test_equals_group_after_group(case, interpreted):
    check_grouped(case, jnp.bfloat16, implementation="pallas_gpu", tolerance=TOLERANCE)


@pytest.mark.parametrize(
    "shape", [(65536, 6144, 9216, 32), (16, 128, 128, 4), (1000, 9216, 6144, 8)]
)
def test_kernels_lower_for_cuda(shape):
    rows, inner, columns, groups = shape
    x = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((groups, inner, columns), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def total(x, w, sizes):
        return jnp.sum(jnp.square(gpu_hopper.grouped_matmul(x, w, sizes).astype(jnp.float32)))

    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(x, w, sizes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3  # forward and both gradients


def test_row_tiles_cover_every_row_once_or_alike():
    sizes = jnp.asarray([0, 5, 130, 64, 1, 0, 300], jnp.int32)
    rows, tile = 520, 128
    tiles = gpu_hopper._row_tiles(sizes, rows, tile)
    number = int(tiles.number[0])
    assert number <= tiles.group.shape[0]
    seen = [None] * rows
    for t in range(number):
        first = int(tiles.first[t])
        assert first % gpu_hopper.ROW_ALIGNMENT == 0
        for row in range(max(first, int(tiles.begin[t])), min(first + tile, int(tiles.end[t]))):
            assert seen[row] in (None, int(tiles.group[t]))
            seen[row] = int(tiles.group[t])
    expected = [g for g, size in enumerate([0, 5, 130, 64, 1, 0, 300, 20]) for _ in range(size)]
    assert seen == expected


def test_refusals_say_what_to_use_instead(monkeypatch):
    x, w = jnp.zeros((16, 128), jnp.bfloat16), jnp.zeros((2, 128, 128), jnp.bfloat16)
    sizes = jnp.asarray([8, 8])

    def refusal(x, w):
        with pytest.raises(NotImplementedError) as caught:
            grouped_matmul(x, w, sizes, implementation="pallas_gpu")
        return str(caught.value)

    assert "cpu: it is written for Hopper" in refusal(x, w)
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    assert "both must be bfloat16" in refusal(x.astype(jnp.float32), w.astype(jnp.float32))
    assert "multiples of 128" in refusal(x, w[:, :, :64])
    with pytest.raises(ValueError, match="shared memory"):
        gpu_hopper.Config(columns=256, slots=8)
