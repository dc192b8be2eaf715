"""Compiler estimates of the TPU lightning attention kernels. No TPU is involved, nothing is timed.

libtpu holds a simulator of the scheduled program. For every chip and kernel this prints the cycles
it counts, the time they take at the chip's clock, the time the HBM traffic takes at the chip's
rate (the simulator's own memory model is too fast, so the larger of the two counts), the VMEM used
and the registers spilled.

    python benchmarks/tpu_static.py            print the table, write results/tpu_static.json
    python benchmarks/tpu_static.py --check    compare with that file; exit 1 if one is 5 % worse

A case takes 15 s (shape block) to 80 s (shape layer) of one core; --chips, --shapes and --kernels
choose among them. Each runs in its own process, which libtpu ends on what it does not model.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LABEL = "compiler estimate, not a measurement"
RESULTS = Path(__file__).parent / "results" / "tpu_static.json"
TOLERANCE = 1.05


class Chip(NamedTuple):
    """The clock is published peak / FLOP per cycle that the simulator reaches."""

    topology: str
    clock_ghz: float
    hbm_gb_per_s: float  # of the device jax shows: on tpu7x that is one of a chip's two cores


# v4 is missing: the simulator has no memory model of it.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5, 819),
    "v5p": Chip("v5p:2x2x1", 1.75, 2765),
    "v6e": Chip("v6e:2x2", 1.75, 1640),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2, 3690),
}
SHAPES = {"block": (1, 4096, 32, 128), "layer": (1, 8192, 64, 128)}  # B, T, H, D; bf16
KERNELS = (
    "forward",
    "forward_save",
    "backward",
    "forward_segments",
    "forward_save_segments",
    "backward_segments",
)


def call(kernel: str, shape: tuple[int, int, int, int]):
    """The kernel as a function of arrays, and the shapes of these."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.lightning_attention import tpu

    batch, length, heads, head_dim = shape
    segmented = kernel.endswith("_segments")
    plan = tpu.Plan.make(
        length=length,
        heads=heads,
        head_dim=head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
        segmented=segmented,
        interpret=False,
    )
    tokens = jax.ShapeDtypeStruct((batch, length, heads * head_dim), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((batch, heads, head_dim, head_dim), jnp.float32)
    slopes = jax.ShapeDtypeStruct((heads,), jnp.float32)
    rows = jax.ShapeDtypeStruct((batch, tpu.TABLE_ROWS, length), jnp.int32) if segmented else None
    if kernel.startswith("backward"):
        shape = (batch, plan.steps * head_dim, heads * head_dim)
        states = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        def backward(q, k, v, slopes, rows, states, grad_out, grad_final):
            return tpu._backward(plan, q, k, v, slopes, rows, states, grad_out, grad_final)

        return backward, (tokens, tokens, tokens, slopes, rows, states, tokens, state)

    def forward(q, k, v, slopes, state, rows):
        save = kernel.startswith("forward_save")
        return tpu._forward(plan, q, k, v, slopes, state, rows, save=save)

    return forward, (tokens, tokens, tokens, slopes, state, rows)


def simulate(pipe, kernel: str, chip: str, shape: tuple[int, int, int, int]) -> None:
    """In a process of its own: compile, and send cycles, VMEM, spills and HBM bytes."""
    with tempfile.TemporaryDirectory() as dump:
        flags = (
            f"--xla_jf_dump_static_llo_profile_to={dump}",
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            # The simulator's path trips on a check that the plain compilation does not make.
            "--xla_tpu_check_llo_types=false",
        )
        os.environ.update(
            LIBTPU_INIT_ARGS=" ".join(flags),
            TPU_SKIP_MDS_QUERY="1",
            TPU_STDERR_LOG_LEVEL="3",
            JAX_PLATFORMS="cpu",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
        sharding = SingleDeviceSharding(topology.devices[0])
        function, arguments = call(kernel, shape)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        text = lowered.compile().as_text()
        spills = spill_stores(Path(dump))
    arrays = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    (line,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    cycles = re.search(r'estimated_cycles":"(\d+)', line)
    memory = re.search(
        r'used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)', line
    )
    pipe.send(
        {
            "cycles": int(cycles[1]),
            "vmem_mib": round(int(memory[1]) / 2**20, 2),
            "spill_stores": spills,
            "hbm_bytes": sum(x.size * x.dtype.itemsize for x in arrays),
        }
    )


def spill_stores(dump: Path) -> int:
    """Registers stored to VMEM for want of registers, in the program of one grid step."""
    tables = dump.glob("*-lightning_*-final_hlo-static-per-bundle-utilization.txt")
    lines = max(tables, key=lambda path: path.stat().st_size).read_text().splitlines()
    names = next(line for line in lines if "VSTORE:SPILL" in line).split(", ")
    body = lines[next(i for i, line in enumerate(lines) if "UTILIZATION" in line) + 1 :]
    column = names.index("VSTORE:SPILL")
    return sum(int(line.split()[column]) for line in body if line.split())


def run(kernel: str, chip: str, shape: str) -> dict | None:
    """One case in its own process; None where libtpu gave up."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=simulate, args=(sender, kernel, chip, SHAPES[shape]))
    process.start()
    sender.close()
    try:
        case = receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()
    case["estimate_us"] = round(case["cycles"] / CHIPS[chip].clock_ghz / 1e3, 1)
    case["hbm_floor_us"] = round(case["hbm_bytes"] / CHIPS[chip].hbm_gb_per_s / 1e3, 1)
    return case


def versions() -> dict[str, str]:
    """Of jax and libtpu: estimates of different compilers differ."""
    try:
        return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    except importlib.metadata.PackageNotFoundError:
        sys.exit("libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'")


def cost(case: dict) -> float:
    """Time in us that a change is judged by."""
    return max(case["estimate_us"], case["hbm_floor_us"])


def line_of(name: str, case: dict) -> str:
    return (
        f"{name:36} {case['cycles']:9} {case['estimate_us']:9} {case['hbm_floor_us']:9} "
        f"{cost(case) / case['hbm_floor_us']:6.2f} {case['vmem_mib']:7} {case['spill_stores']:6}"
    )


def write(cases: dict[str, dict]) -> None:
    from pallas_kernels.lightning_attention import tpu

    results = {
        "label": LABEL,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "shapes_b_t_h_d": SHAPES,
        "chips": {name: chip._asdict() for name, chip in CHIPS.items()},
        "vmem_limit_mib": tpu.VMEM_LIMIT_BYTES // 2**20,
        "cases": cases,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=LABEL)
    parser.add_argument("--check", action="store_true", help="compare with the committed results")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    options = parser.parse_args()

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    if options.check and known.get("versions") != versions():
        print(f"note: the committed results are of {known.get('versions')}")
    # Cases that are not run again stay in the file, unless another compiler made them.
    cases = dict(known["cases"]) if known.get("versions") == versions() else {}
    wrong = False
    print(f"{LABEL}; {versions()}; B, T, H, D: {SHAPES}")
    columns = (
        f"{'cycles':>9} {'estimate':>9} {'HBM floor':>9} {'ratio':>6} {'VMEM':>7} {'spills':>6}"
    )
    print(f"{'case; us, MiB':36} {columns}")
    for shape, chip, kernel in itertools.product(options.shapes, options.chips, options.kernels):
        name = f"{shape} {chip} {kernel}"
        case = run(kernel, chip, shape)
        if case is None:
            print(f"{name:36} libtpu gave up; its reason is on stderr", flush=True)
            wrong = True
            continue
        before = known["cases"].get(name)
        worse = before is not None and cost(case) > TOLERANCE * cost(before)
        wrong |= worse
        print(line_of(name, case), f"WORSE, was {cost(before)}" if worse else "", flush=True)
        cases[name] = case
        if not options.check:
            write(cases)
    if options.check and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
