"""The plans of docs/plans.md made anew; the search; what is said when memory runs out."""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import pytest
from cpu_clock import cpu_seconds
from random_models import random_params, random_tokens, small_config
from sweeps import sweep

import mmx
from mmx.cli import main
from mmx.planning.exhausted import MemoryExhausted, explained, of_engine
from mmx.planning.search import best
from mmx.planning.topology import parse_topology

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import plans  # noqa: E402

COMPILED = json.loads(plans.RESULTS.read_text())
LINES = {
    line.split(" | ")[0].removeprefix("| "): line
    for line in plans.DOCUMENT.read_text().splitlines()
    if line.startswith(("| train", "| prefill", "| decode"))
}


def numbers(line: str) -> list[float]:
    cells = line.split(" | ")
    del cells[2]  # the compiler's, which is not asked again
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]+\.?\d*", " ".join(cells[1:]))]


def test_the_document_has_every_example():
    assert list(LINES) == list(plans.EXAMPLES)
    assert mmx.preset("minimax-m1-80k") == mmx.preset("minimax-text-01")


# Training steps take seconds each to trace: one of each length here, the others where it is slow.
SLOW = ("train 8K, 1024 v5p", "train 8K, 2048 v5p")


@functools.cache
def quick(name):
    return plans.quick(name)


@pytest.mark.parametrize("name", sweep(plans.EXAMPLES, lambda name: name not in SLOW))
def test_the_quick_plans_are_those_of_the_document(name):
    """2 %: figures are rounded to three digits, and other code may keep a little more or less."""
    plan = quick(name)
    line = plans.line(name, plan, COMPILED.get(name))
    assert numbers(line) == pytest.approx(numbers(LINES[name]), rel=0.02)
    assert line.split(" | ")[4] == LINES[name].split(" | ")[4]


def test_int8_halves_the_experts():
    ask = quick("decode 128K in int8, 8 H200")
    # 435 GB of experts and 21 of attention in int8 over 8, embedding and head over 8 in bf16.
    assert ask.memory["parameters"] == pytest.approx(459e9 / 8, rel=0.01)


def test_the_search_is_of_meshes_that_fit_best_first():
    fields = dict(
        name="tiny", config=mmx.preset("tiny"), mode="prefill", topology=parse_topology("h200:4"),
        seq=256, batch=8,
    )  # fmt: skip
    found = best(fields, traced=3)
    assert 2 <= len(found) <= 3
    assert all(plan.fits for plan in found)
    times = [plan.bound.serial for plan in found]
    assert times == sorted(times)
    assert len({tuple(plan.request.mesh.values()) for plan in found}) == len(found)
    # No mesh holds 912 GB of weights on 4 GPUs.
    assert best(fields | dict(config=mmx.preset("minimax-text-01"), name="x"), traced=1) == []


def test_a_quick_plan_that_does_not_fit_takes_15_seconds_at_most(capsys):
    """It says by how much, and plans what would change that."""
    start = cpu_seconds()
    machine = ("--topology", "v5p:4x4x4", "--mesh", "fsdp=2,expert=32")
    options = ("--mode", "train", "--seq", "8192", "--batch", "64", *machine, "--quick")
    assert main(["plan", "minimax-text-01", *options]) == 1
    assert cpu_seconds() - start < 15
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"it does not fit by [\d.]+ GB on each device --optimizer-dtype", said)


# ---------------------------------------------------------------- memory that runs out


def injected(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")


def test_the_engine_explains_that_memory_ran_out(monkeypatch, capfd):
    config = small_config("ls", chunk_size=32)
    monkeypatch.setattr("mmx.inference.engine.prefill", injected)
    with pytest.raises(MemoryExhausted, match=r"RESOURCE_EXHAUSTED.*; see the table above: try"):
        mmx.generate(
            random_params(config, 0), random_tokens(config, (2, 8), 0), config, max_new_tokens=4
        )
    said = capfd.readouterr().err
    assert "keys and values" in said
    assert len(re.findall(r"GB instead of|MB instead of|kB instead of", said)) == 3


def test_other_errors_pass_through():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained(lambda: None):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    config = small_config("ls")
    ask = of_engine(config, random_params(config, 0), rows=2, tokens=512)
    assert (ask.mode, ask.batch, ask.seq) == ("decode", 2, 256)
