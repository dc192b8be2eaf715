"""Compile kernels for every TPU generation with libtpu. No TPU is needed, none is looked for.

A test module names what to compile in `compile_cases() -> [Compile]` and calls
`compile_for_every_tpu(__name__, everything=...)`; the compiler runs in a process of its own, which
imports it. Each case is compiled for one generation, in turn, and each generation has one; or all
for all, which takes five times as long and is left to `make test-all`.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CHIPS = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}
# `make test` puts libtpu there: inside the environment it would make jax look for a TPU.
BESIDE = Path(sys.prefix) / "libtpu"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not (BESIDE / "libtpu").is_dir(),
    reason="libtpu, the TPU compiler, is not installed",
)


@dataclass(frozen=True)
class Compile:
    """A function of `arguments` (shapes) that must compile to `kernels` Pallas kernels."""

    name: str
    function: Callable
    arguments: tuple
    kernels: int


def compile_for_every_tpu(module: str, *, everything: bool) -> None:
    """Assert that `compile_cases()` of a module compile, as many as are due."""
    settings = dict(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    here = Path(__file__).parent
    settings["PYTHONPATH"] = os.pathsep.join(map(str, (BESIDE, here, here.parent)))
    done = subprocess.run(
        [sys.executable, __file__, module, *(["--all"] if everything else [])],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    cases = importlib.import_module(module).compile_cases()
    assert {case.name for case in cases} == {name.split(" ", 1)[1] for name in seen}
    assert {name.split(" ", 1)[0] for name in seen} == set(CHIPS)
    assert {name: error for name, error in seen.items() if error is not None} == {}


def _compile(device, case: Compile) -> str | None:
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.arguments
    )
    try:
        lowered = jax.jit(case.function).trace(*arguments).lower(lowering_platforms=("tpu",))
        program = str(lowered.compile().as_text())
    except Exception as error:  # of whatever kind: the test reports it
        return f"{type(error).__name__}: {error}"[:500]
    kernels = program.count('custom_call_target="tpu_custom_call"')
    return None if kernels == case.kernels else f"{kernels} kernels, not {case.kernels}"


def main(module: str, *, everything: bool) -> None:
    cases = importlib.import_module(module).compile_cases()
    turns = max(len(cases), len(CHIPS))
    for number, (chip, (name, options)) in enumerate(CHIPS.items()):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        in_turn = [cases[turn % len(cases)] for turn in range(number, turns, len(CHIPS))]
        for case in cases if everything else in_turn:
            print(json.dumps([f"{chip} {case.name}", _compile(topology.devices[0], case)]))


if __name__ == "__main__":
    main(sys.argv[1], everything="--all" in sys.argv)
