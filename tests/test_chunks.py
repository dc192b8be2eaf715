"""Chunk shapes against their promises, and transposing copies against numpy's."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from mmx.convert.chunks import DTYPES, ArrayLayout, choose_chunk
from mmx.convert.transposing import copy, to_contiguous

MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        # The released model: an expert's matrix is one chunk, the embedding is cut by rows of it.
        ((10, 32, 6144, 9216), dict(stacked=2), (1, 1, 6144, 9216)),
        ((200064, 6144), dict(stacked=0), (8336, 6144)),
        ((6144, 200064), dict(stacked=0, cut=1), (6144, 8336)),
        ((6144, 200064), dict(stacked=0, cut=0), (256, 200064)),
        ((10, 6144, 64, 3, 128), dict(stacked=1), (1, 2048, 64, 3, 128)),
        ((10, 32, 6144, 9216), dict(stacked=2, divide=(1, 8, 1, 4)), (1, 1, 6144, 2304)),
        ((10, 32, 6144, 9216), dict(stacked=2, divide=(1, 32, 2)), (1, 1, 3072, 9216)),
        ((200064, 6144), dict(stacked=0, divide=(8,)), (8336, 6144)),
        ((200064, 6144), dict(stacked=0, divide=(64,)), (3126, 6144)),
        ((6144,), dict(stacked=0), (6144,)),
        ((), dict(stacked=0), ()),
        ((10,), dict(stacked=1), (1,)),
        # A prime number of rows: chunks that are not all alike rather than one for each row.
        ((200063, 6144), dict(stacked=0), (10529, 6144)),
    ],
)
def test_known_choices(shape, options, wanted):
    assert choose_chunk(shape, 2, max_bytes=128 * MIB, **options) == wanted


def test_promises_of_random_choices():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        dims = int(rng.integers(0, 5))
        divide = tuple(int(n) for n in rng.integers(1, 5, rng.integers(0, dims + 1)))
        shape = tuple(
            int(n) * (divide[d] if d < len(divide) else 1)
            for d, n in enumerate(rng.integers(1, 40, dims))
        )
        stacked = int(rng.integers(0, dims + 1))
        cut = int(rng.integers(stacked, dims)) if stacked < dims and rng.random() < 0.5 else None
        itemsize, most = int(rng.choice([1, 2, 4, 8])), int(rng.integers(8, 20000))
        chunk = choose_chunk(
            shape, itemsize, stacked=stacked, max_bytes=most, divide=divide, cut=cut
        )
        assert math.prod(chunk) * itemsize <= most
        assert all(1 <= step <= size for step, size in zip(chunk, shape, strict=True))
        assert chunk[:stacked] == (1,) * stacked
        for size, step, devices in zip(shape, chunk, divide, strict=False):
            if devices > 1:
                assert size // devices % step == 0
        whole = shape[stacked:]
        if math.prod(whole) * itemsize <= most and not any(n > 1 for n in divide):
            assert chunk[stacked:] == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shape=(4, 0)), "no items"),
        (dict(shape=(30, 7), divide=(4,)), "dimension 0 of .* 4 devices; .* 30 divides by is 3"),
        (dict(shape=(2, 64), divide=(1, 48)), "dimension 1 .* 64 divides by is 32"),
        (dict(shape=(2, 4), divide=(0,)), "dimension 0"),
        (dict(shape=(8,), divide=(2, 2)), "divide is"),
        (dict(shape=(8,), max_bytes=1), "one item has 2 bytes"),
        (dict(shape=(8,), stacked=2), "stacked is 2"),
        (dict(shape=(8, 8), stacked=1, cut=0), r"cut is 0; it must be in \[1, 2\)"),
        (dict(shape=(8, 8), cut=2), "cut is 2"),
    ],
)
def test_impossible_choices(options, message):
    shape = options.pop("shape")
    with pytest.raises(ValueError, match=message):
        choose_chunk(shape, 2, **{"stacked": 0, "max_bytes": 64, **options})


@pytest.mark.parametrize(
    ("shape", "chunk"), [((5, 6, 7), (2, 6, 3)), ((), ()), ((4,), (4,)), ((3, 3), (1, 1))]
)
def test_regions_cover_every_item_once(shape, chunk):
    layout = ArrayLayout(shape, "float32", chunk)
    seen = np.zeros(shape, int)
    for index in layout.chunks():
        region = layout.region(index)
        seen[region] += 1
        assert layout.touched(region) == tuple(range(i, i + 1) for i in index)
    assert (seen == 1).all()
    assert layout.nbytes == 4 * math.prod(shape)
    for wrong in ((-1,) * len(shape), layout.grid, (0,) * (len(shape) + 1)):
        if shape or wrong:
            with pytest.raises(ValueError, match="there is no chunk"):
                layout.region(wrong)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_transposed_matrices_of_every_dtype_and_odd_size(dtype):
    rng = np.random.default_rng(0)
    for rows, columns in itertools.product((1, 3, 8, 511, 512, 513, 1032), (1, 5, 1023, 1030)):
        raw = rng.integers(0, 2, (rows, columns, dtype.itemsize), np.uint8)
        matrix = raw.view(dtype)[..., 0].T
        result = to_contiguous(matrix)
        assert result.flags.c_contiguous
        assert result.dtype == dtype
        assert result.tobytes() == matrix.tobytes()


def test_views_as_the_mapping_makes_them():
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 1 << 16, (24 * 3 * 8, 640), np.uint16).view(ml_dtypes.bfloat16)
    experts = rng.integers(0, 1 << 16, (4, 96, 640), np.uint16).view(ml_dtypes.bfloat16)
    for view in (
        stored.T.reshape(640, 24, 3, 8),
        stored.T.reshape(4, 160, 576),
        stored[8:16].T,
        stored[:, 3:].T,
        stored.T[:, ::2],
        experts.transpose(0, 2, 1),
        experts.transpose(2, 0, 1),
        experts[1, 48:].T,
        experts[::-1].transpose(0, 2, 1),
    ):
        result = to_contiguous(view)
        assert result.flags.c_contiguous
        assert result.shape == view.shape
        assert result.tobytes() == view.tobytes()


def test_random_views():
    rng = np.random.default_rng(2)
    for _ in range(500):
        dims = int(rng.integers(0, 5))
        dtype = rng.choice(["u1", "u2", "f4", "f8", "c16"])
        array = rng.integers(0, 255, tuple(rng.integers(1, 9, dims))).astype(dtype)
        array = array.transpose(rng.permutation(dims))
        starts, steps = rng.integers(0, 2, dims), rng.choice([1, 1, 2, -1], dims)
        array = array[
            tuple(slice(int(b) * (s > 0), None, int(s)) for b, s in zip(starts, steps, strict=True))
        ]
        result = to_contiguous(array)
        assert result.flags.c_contiguous
        assert result.shape == array.shape
        assert result.tobytes() == array.tobytes()


def test_an_array_in_order_is_not_copied_and_a_wrong_target_is_refused():
    array = np.zeros((3, 4), np.float32)
    assert to_contiguous(array) is array
    for wrong in (np.zeros((4, 3), np.float32), np.zeros((3, 4)), np.zeros((4, 3), np.float32).T):
        with pytest.raises(ValueError, match="it must be float32"):
            copy(wrong, array)
