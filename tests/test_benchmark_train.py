"""The training benchmark: its estimates, its ratios, and that what it times is the fast path."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmx
from benchmarks import train, train_memory
from benchmarks.measure import Report
from mmx.training.state import abstract_state
from mmx.training.step import StepOptions, make_train_step
from pallas_kernels import platform

# The widths of bench-4b, one layer of each kind.
CONFIG = dataclasses.replace(
    mmx.preset("bench-4b"), layer_kinds=("lightning", "softmax"), vocab_size=512
)


def tokens(rows, length):
    return {"tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32)}


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_lowers_to_the_hopper_kernels(packed, monkeypatch):
    monkeypatch.setattr(platform, "gpu_compute_capability", lambda: (9, 0))
    options = StepOptions(train.RATE, remat="layer")
    batch = {"tokens": jax.ShapeDtypeStruct((1, 2, 256), jnp.int32)}
    if packed:
        batch["segment_ids"] = batch["tokens"]
    traced = make_train_step(CONFIG, options).program.trace(
        abstract_state(CONFIG, options.optimizer), batch, jax.ShapeDtypeStruct((), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @([\w$]+)", text)
    assert "ragged_dot" not in text  # the form that the grouped kernels replace
    assert any(name.startswith("mosaic_gpu") for name in calls)
    assert "__cudnn$fmhaSoftmax" in calls
    assert "__cudnn$fmhaSoftmaxBackward" in calls


def test_the_estimate_adds_up():
    params = mmx.count_params(CONFIG)[0]
    rows = {
        remat: train_memory.estimate_step(
            CONFIG, tokens(1, 256), StepOptions(train.RATE, remat=remat)
        )
        for remat in ("none", "layer")
    }
    for row in rows.values():
        # Master and two moments in fp32; the compute copy in bf16 but for norms and routers.
        assert row["state_GB"] == pytest.approx(12e-9 * params, rel=1e-4)
        assert row["params_GB"] == pytest.approx(2e-9 * params, rel=1e-3)
        activations = max(row["saved_GB"] + row["again_GB"], 4e-9 * params)
        total = row["state_GB"] + row["params_GB"] + row["grads_GB"] + activations
        assert row["sum_GB"] == pytest.approx(total, rel=1e-3)
    assert rows["layer"]["again_GB"] == pytest.approx(rows["none"]["saved_GB"] / 2)


def test_saved_bytes_grow_by_what_a_token_must_keep():
    params = mmx.model.abstract_params(CONFIG, dtype=jnp.dtype(jnp.bfloat16))
    short, long = (
        train_memory.saved_bytes(CONFIG, params, tokens(1, length), "layer")
        for length in (256, 512)
    )
    # Inputs of the two layers in bf16, at least; the head keeps fp32 logits and its own inputs.
    least = 256 * 2 * 2 * CONFIG.embed_dim
    assert (
        least <= long - short <= least + 256 * (4 * 4 * CONFIG.vocab_size + 24 * CONFIG.embed_dim)
    )


def test_ratios_are_over_the_best_of_the_peer(tmp_path):
    report = Report(60, str(tmp_path / "rows.json"))
    for part, speed in (
        ("step", 60.0), ("peer_step", 20.0), ("peer_step", 30.0), ("gradient", 90.0),
        ("long_8192", 50.0), ("long_131072", 40.0), ("packed", 45.0),
    ):  # fmt: skip
        report.add(part=part, tokens_per_s=speed)
    train.compare(report)
    seen = {(r["compared"], r["to"]): r["times"] for r in report.rows if "compared" in r}
    assert seen == {
        ("step", "peer_step"): 2.0,
        ("packed", "step"): 0.75,
        ("long_131072", "long_8192"): 0.8,
    }
