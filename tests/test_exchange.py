"""Slices of rows that travel between devices, and the pieces they are cut into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import exchange


def test_slices_are_cut_into_pieces_of_the_same_rows():
    """Empty ones, ones of fewer rows than pieces, and others; targets move with the rows."""
    sizes, begins, targets = [0, 1, 4, 7, 29], [3, 3, 4, 8, 15], [50, 0, 20, 5, 60]
    cut = exchange._cut(exchange.Lanes(*map(jnp.asarray, (begins, sizes, targets))), 4)
    for slice_ in range(5):
        mine = slice(4 * slice_, 4 * slice_ + 4)
        pairs = [
            (begin + row, target + row)
            for begin, size, target in zip(*(np.asarray(x)[mine] for x in cut), strict=True)
            for row in range(size)
        ]
        whole = [(begins[slice_] + row, targets[slice_] + row) for row in range(sizes[slice_])]
        assert pairs == whole
        assert np.ptp(cut.sizes[mine]) <= 1


@pytest.mark.parametrize(
    ("target", "processes", "devices", "pieces"),
    [("gpu", 1, 2, 64), ("gpu", 1, 8, 256), ("gpu", 2, 2, 1), ("tpu", 1, 2, 1), ("cpu", 1, 2, 1)],
)
def test_pieces_are_for_gpus_of_one_process(target, processes, devices, pieces, monkeypatch):
    """Of eight experts: 256 slices to each device."""
    monkeypatch.setattr(exchange.platform, "target", lambda: target)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax.lax, "axis_size", lambda axis_name: devices)
    sizes = jnp.zeros(8, jnp.int32)
    assert exchange._pieces("expert", exchange.Lanes(sizes, sizes, sizes)) == pieces
