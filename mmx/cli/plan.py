"""`mmx plan`: whether a program fits a machine nobody has at hand, and how fast it could be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from mmx.cli.source import config_of

FITS, DOES_NOT_FIT = 0, 1


@dataclass(frozen=True)
class PlanOptions:
    """Compile the real program for a machine that is not here: does it fit, how fast at most.

    Exit code 0 if it fits, 1 if it does not, 2 for bad input.
    """

    model: tyro.conf.Positional[str]
    """A preset of `mmx info`, or a checkpoint folder."""
    mode: Literal["train", "prefill", "decode"]
    """A step of training, a prompt, or the next token of a batch."""
    topology: str
    """CHIP:SHAPE: v5p:8x8x8, v6e:16x16, h200:8x16 (GPUs of a host x hosts)."""
    seq: int
    """Tokens a row; in decode those the memory holds."""
    batch: int = 1
    """Rows of a micro-batch, over all devices."""
    mesh: str = ""
    """Devices by axis: fsdp=16,expert=32; what is not named is 1, fsdp what is left.

    Without any: fsdp in training, and in inference the experts first.
    """
    slices: int = 1
    """As many of the topology, with the slow network between them."""
    rules: Literal["auto", "fsdp", "tensor", "expert", "long_context", "serving", "decode"] = "auto"
    """What the axes of the mesh split."""
    accumulation: int = 1
    """Micro-batches of a step."""
    remat: Literal["none", "superblock", "layer"] = "layer"
    """What the backward pass computes again."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the optimizer's first moment."""
    capacity_factor: float | None = 1.25
    """Room of an expert as a multiple of its even share (not in decode); none drops nothing."""
    expert_groups: int = 1
    """Parts of each device's tokens that go to their experts one after the other."""
    weights: Literal["bf16", "int8"] = "bf16"
    """Of the large matrices in inference."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the plan there as well."""
    quick: bool = False
    """Compile and lower nothing: bytes from shapes, an estimate of what comes and goes."""
    parameters: bool = False
    """Print every parameter too: its shape, how it is split, bytes on each device."""
    search: bool = False
    """Try the meshes there are and plan the best."""


def parse(arguments: Sequence[str]) -> PlanOptions:
    """The options of a command line."""
    return tyro.cli(PlanOptions, prog="mmx plan", args=list(arguments))


def request_of(options: PlanOptions) -> Any:
    """The `mmx.planning.programs.Request` of a command line.

    Raises:
      ValueError: unknown names, or sizes that do not fit.
    """
    from mmx.planning.programs import request
    from mmx.planning.serving_mesh import legal
    from mmx.planning.topology import parse_mesh

    fields = _fields(options)
    if not options.mesh and options.mode != "train":
        found = next(legal(fields, options.rules), None)
        if found is not None:
            return found
    return request(mesh=parse_mesh(options.mesh), chosen_rules=options.rules, **fields)


def _fields(options: PlanOptions) -> dict[str, Any]:
    from mmx.planning.topology import parse_topology

    return dict(
        name=options.model,
        config=config_of(options.model),
        mode=options.mode,
        topology=parse_topology(options.topology, options.slices),
        seq=options.seq,
        batch=options.batch,
        accumulation=options.accumulation,
        remat=options.remat,
        optimizer_dtype=options.optimizer_dtype,
        capacity_factor=options.capacity_factor,
        expert_groups=options.expert_groups,
        weights=options.weights,
    )


def main(arguments: Sequence[str]) -> int:
    """Print the plan."""
    options = parse(arguments)
    config_of(options.model)
    import jax

    # Nothing runs here: no device of this machine is to be found, waited for or held.
    jax.config.update("jax_platforms", "cpu")
    if not options.search:
        return _plan(request_of(options), options)
    from mmx.planning.search import print_best

    ask = print_best(_fields(options), Console())
    return DOES_NOT_FIT if ask is None else _plan(ask, options)


def _plan(ask: Any, options: PlanOptions) -> int:
    from mmx.planning.advice import advise
    from mmx.planning.parameters import parameter_lines, parameter_rows, parameters_json
    from mmx.planning.report import make_plan, render, to_json

    compiler = None
    if not options.quick and ask.topology.chip.kind == "tpu":
        from mmx.planning.aot import compile_request as compiler
    elif not options.quick:
        from mmx.planning.lowering import lower_request as compiler
        from mmx.planning.lowering import make_room

        make_room(ask)
    plan = make_plan(ask, compiler)
    advice = [] if plan.fits else advise(plan)
    Console().print(render(plan, advice))
    found = to_json(plan, advice)
    if options.parameters:
        rows = parameter_rows(ask)
        print(*parameter_lines(rows), sep="\n")
        found["parameters"] = parameters_json(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return FITS if plan.fits else DOES_NOT_FIT
