"""The plans of docs/plans.md made anew; the search; what is said when memory runs out."""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from random_models import random_params, random_tokens, small_config

import mmx
from mmx.planning import aot
from mmx.planning.exhausted import MemoryExhausted, explained, of_engine
from mmx.planning.memory import work
from mmx.planning.programs import build, request
from mmx.planning.report import make_plan
from mmx.planning.search import best
from mmx.planning.topology import parse_mesh, parse_topology
from mmx.planning.walk import live

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


@pytest.mark.parametrize("name", plans.EXAMPLES)
def test_the_quick_plans_are_those_of_the_document(name):
    """2 %: figures are rounded to three digits, and other code may keep a little more or less."""
    plan = plans.quick(name)
    line = plans.line(name, plan, COMPILED.get(name))
    assert numbers(line) == pytest.approx(numbers(LINES[name]), rel=0.02)
    assert line.split(" | ")[4] == LINES[name].split(" | ")[4]


def test_a_step_on_one_h200_is_planned_as_it_was_measured():
    """Peak memory within 10 %, the products within 1 % of the model's FLOPs."""
    results = json.loads((ROOT / "benchmarks" / "results" / "train_h200.json").read_text())
    step = next(row for row in results["rows"] if row.get("part") == "step")
    plan = make_plan(
        request(
            name="bench-4b",
            config=mmx.preset("bench-4b"),
            mode="train",
            topology=parse_topology("h200:1x1"),
            mesh=parse_mesh("fsdp=1"),
            chosen_rules="fsdp",
            seq=step["length"],
            batch=step["rows"],
            remat=step["remat"],
            optimizer_dtype="float32",
            capacity_factor=None,
        )
    )
    assert plan.total == pytest.approx(1e9 * step["program_GB"], rel=0.1)
    flops = sum(part.flops for part in plan.bound.parts) - plan.flops_again
    assert flops == pytest.approx(1e9 * step["model_TFLOPs"] * step["ms"], rel=0.01)


def test_int8_halves_the_experts():
    ask = plans.quick("decode 128K in int8, 8 H200")
    # 435 GB of experts and 21 of attention in int8 over 8, embedding and head over 8 in bf16.
    assert ask.memory["parameters"] == pytest.approx(459e9 / 8, rel=0.01)


def test_the_search_is_of_meshes_that_fit_best_first():
    fields = dict(
        name="tiny", config=mmx.preset("tiny"), mode="train", topology=parse_topology("h200:8"),
        seq=256, batch=8,
    )  # fmt: skip
    found = best(fields, traced=3)
    assert 2 <= len(found) <= 3
    assert all(plan.fits for plan in found)
    times = [plan.bound.serial for plan in found]
    assert times == sorted(times)
    assert len({tuple(plan.request.mesh.values()) for plan in found}) == len(found)
    # No mesh of 64 experts' worth of chips holds the state of 456 B on 8 GPUs.
    assert best(fields | dict(config=mmx.preset("minimax-text-01"), name="x"), traced=1) == []


# ---------------------------------------------------------------- arrays out of a loop


def test_a_mask_that_a_loop_keeps_is_seen():
    """The causal mask does not depend on what is differentiated: 4 turns of 64 x 64 booleans."""
    ask = request(
        name="tiny", config=mmx.preset("tiny"), mode="train", topology=parse_topology("h200:1"),
        mesh=parse_mesh(""), seq=64, batch=1,
    )  # fmt: skip
    program = build(ask)

    def loss(x):
        def turn(c, i):
            mask = jnp.arange(64)[:, None] + i >= jnp.arange(64)
            return jnp.where(mask, jnp.sin(c), 0), None

        return jax.lax.scan(turn, x, jnp.arange(4))[0].sum()

    jaxpr = live(jax.jit(jax.grad(loss)).trace(jnp.ones((64, 64))).jaxpr)
    kept = work(program, jaxpr).stacked
    assert (4 * 64 * 64, "bool[4,64,64]") in {(size, shape) for size, _, shape in kept}


def test_zeros_made_before_a_loop_are_seen():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    ask = request(
        name="tiny", config=mmx.preset("tiny"), mode="train", topology=parse_topology("h200:8"),
        mesh=parse_mesh("fsdp=8"), seq=64, batch=8,
    )  # fmt: skip

    def loss(x, read):
        made = jax.shard_map(
            lambda: jnp.zeros((500,)), mesh=mesh, in_specs=(), out_specs=P("a"), check_vma=False
        )()

        def turn(c, _):
            return c * (c + made if read else c), None

        return jax.lax.scan(turn, x, None, length=3)[0].sum() + made[0]

    for read in (True, False):
        jaxpr = live(jax.jit(functools.partial(loss, read=read)).trace(jnp.ones(4000)).jaxpr)
        shapes = [shape for _, _, shape in work(build(ask), jaxpr).hoisted]
        assert shapes == ["float32[4000]"] * read


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


@pytest.mark.parametrize(
    ("message", "reason", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 100.50G of 95.73G hbm.",
         "HBM is too small", int(100.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem, "
         "kernel_name=lightning_forward Used 160.00M of 127.94M vmem.",
         "in the kernel lightning_forward", 160 * 2**20),
    ],
)  # fmt: skip
def test_a_compiler_without_memory_is_understood(message, reason, needed):
    assert aot.out_of_memory(RuntimeError(message))
    assert reason in aot._reason(message)
    assert aot._needed(message) == needed


def test_a_first_moment_in_bf16_trains_nearly_the_same():
    from mmx.training.optimizer import OptimizerOptions, make_optimizer

    config = small_config("ls")
    params = random_params(config, 0)
    grads = jax.tree.map(lambda x: jnp.sin(x), params)
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(config, OptimizerOptions(first_moment_dtype=dtype))
        state = optimizer.init(params)
        moments = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
        assert (("bfloat16" in moments), "float32" in moments) == (dtype == "bfloat16", True)
        for _ in range(3):
            update, state = optimizer.update(grads, state, params)
        updates[dtype] = update
    for one, other in zip(*map(jax.tree.leaves, updates.values()), strict=True):
        # m is rounded to 8 bits once a step, three times.
        np.testing.assert_allclose(one, other, rtol=2**-8 * 3, atol=1e-6)
    with pytest.raises(ValueError, match="first_moment_dtype is 'float16'"):
        OptimizerOptions(first_moment_dtype="float16")
