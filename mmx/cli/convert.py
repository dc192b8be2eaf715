"""`mmx convert`: a checkpoint of any form to another, in bounded memory, resumable, verified."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mmx.cli.lists import gather_repeated
from mmx.convert.memory import parse_size, peak_resident

if TYPE_CHECKING:
    from mmx.convert.plan import Plan
    from sharding import Partition

_REFRESH = 2  # times a second


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint: Hugging Face (released or transformers' layout), Orbax, or a run.

    Direction and layout are found out from SRC. The output is made in DST.converting and gets its
    name once it is whole, with digests of every tensor in MANIFEST.json.
    """

    src: tyro.conf.Positional[Path]
    """The folder of a checkpoint, or of a training run."""
    dst: tyro.conf.Positional[Path]
    """The folder to write; it must not exist, or be empty."""
    to: Literal["orbax", "hf", "hf-released"]
    """Form to write: orbax, transformers' (hf), or that of the released code (hf-released)."""
    dtype: Literal["as-is", "bf16", "fp32"] = "as-is"
    """Of the parameters. bf16 rounds to nearest even, but never the routers."""
    max_ram: str = "8GiB"
    """Memory of the whole process, as 3GiB, 500MB or bytes."""
    shard_size: str = "5GB"
    """Bytes of tensors in a safetensors file; a larger tensor has a file of its own."""
    experts: Literal["separate", "fused"] | None = None
    """Layout of experts of --to hf; as in SRC by default."""
    mesh: str = ""
    """axis=n,...: cut Orbax chunks so that each device of such a mesh reads its own."""
    rules: Literal["fsdp", "tensor", "expert", "long_context", "serving"] = "expert"
    """What the axes of --mesh split, as for `mmx train`."""
    workers: int | None = None
    """Threads; by default two a core, at most 4."""
    verify: Literal["full", "sample", "none"] = "sample"
    """Compare the output with SRC: all of it, about 1 %, or nothing."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of keys that may be missing in SRC; they are left out of DST."""
    allow_extra: tuple[str, ...] = ()
    """Patterns of keys in SRC that have no place; they are dropped."""
    max_header: str = "8MiB"
    """What the header of a safetensors file of SRC may have, as --max-ram."""
    dry_run: bool = False
    """Print what becomes of every tensor, memory and sizes; read headers alone, write nothing."""
    resume: bool = False
    """Go on with a conversion that was interrupted."""
    overwrite: bool = False
    """Replace a checkpoint that is at DST, once the new one is whole."""


def main(arguments: Sequence[str]) -> int:
    """Convert, or print the plan."""
    given = gather_repeated(Convert, arguments)
    options = tyro.cli(Convert, prog="mmx convert", args=given)
    max_ram = parse_size(options.max_ram, "--max-ram")
    shard_size = parse_size(options.shard_size, "--shard-size")
    max_header = parse_size(options.max_header, "--max-header")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers}: must be at least 1")
    # Imported late: what is wrong with an option is said at once.
    from mmx.convert.plan import Options, make_plan
    from mmx.convert.safetensors_file import Limits
    from mmx.convert.source import open_source
    from mmx.convert.workplace import check_apart, check_destination

    if not options.src.is_dir():
        raise ValueError(f"{options.src}: no such folder; give the folder of a checkpoint")
    destination = options.dst.absolute()
    check_apart(options.src, destination)
    if not options.resume:
        check_destination(destination, overwrite=options.overwrite)
    source = open_source(
        options.src,
        allow_missing=options.allow_missing,
        allow_extra=options.allow_extra,
        read_data=not options.dry_run,
        limits=Limits(header_bytes=max_header),
    )
    asked = Options(
        options.to, options.dtype, shard_size, options.experts,
        _partition(options.mesh, options.rules), options.allow_missing, options.allow_extra,
    )  # fmt: skip
    plan = make_plan(source, asked)
    if options.dry_run:
        return _dry_run(plan, options, destination)
    return _convert(plan, options, destination, max_ram)


def _convert(plan: "Plan", options: Convert, destination: Path, max_ram: int) -> int:
    from mmx import integrity
    from mmx.convert.check import check_output
    from mmx.convert.stream import default_workers, execute, machine
    from mmx.convert.workplace import Workplace

    console = Console(stderr=True)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    use = machine(plan, max_ram, options.workers or default_workers())
    begun = time.monotonic()
    if options.verify != "none" or plan.source.form == "run":
        plan.source.check()
    identity = plan.identity()
    with Workplace(
        destination, identity, resume=options.resume, overwrite=options.overwrite
    ) as work:
        if work.state == "published":
            if options.verify == "full":
                check_output(plan, destination, "full", use)
            print(f"{options.dst}: is whole already")
            return 0
        done = 0
        if work.state == "begun":
            _check_room(work.folder, plan.nbytes - sum(e["size"] for e in work.done.values()))
            with _bar(console, plan.nbytes) as advance:
                done = execute(plan, work, use, advance)
        else:
            # It was whole when its manifest was written; a check may have failed since.
            integrity.verify(work.folder)
        seconds = time.monotonic() - begun
        compared = check_output(plan, work.folder, options.verify, use)
        work.publish()
    files = sum(1 for path in destination.rglob("*") if path.is_file())
    print(
        f"{options.dst}: {files:,} files, {plan.nbytes:,} bytes of tensors; wrote "
        f"{decimal(done)} in {seconds:.1f} s ({done / 1e9 / max(seconds, 1e-9):.2f} GB/s), "
        f"peak memory {decimal(peak_resident())}"
    )
    if compared:
        print(f"compared {compared:,} pieces with {options.src}: equal")
    return 0


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: needs {decimal(needed)} more, and {decimal(free)} are free; make "
            "room and run the same again with --resume"
        )


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with GB/s and what is left, where a person watches; `advance` is for any thread."""
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=_REFRESH) as progress:
        task = progress.add_task("converting", total=total)
        yield lambda number: progress.advance(task, number)


def _dry_run(plan: "Plan", options: Convert, destination: Path) -> int:
    from mmx.convert.memory import resident
    from mmx.convert.plan_rows import rows
    from mmx.convert.stream import MARGIN, default_workers, largest_piece

    console = Console(soft_wrap=True, highlight=False)
    keys: set[str] = set()
    stored = 0
    for row in rows(plan):
        shape = "x".join(map(str, row.shape)) or "()"
        print(f"{row.key} -> {row.target}  {shape} {row.dtype}  {row.transform}  {row.nbytes:,} B")
        if row.key != "-":
            keys.add(row.key)
            stored += row.nbytes
    for note in plan.notes:
        console.print(escape(f"note: {note}"))
    parent = next(path for path in destination.parents if path.exists())
    free = shutil.disk_usage(parent).free
    piece, workers = largest_piece(plan), options.workers or default_workers()
    memory = resident() + MARGIN
    print(f"source: {len(keys):,} keys, {stored:,} bytes ({plan.source.form})")
    what = f"{len(plan.shards):,} files" if plan.shards else f"{len(plan.trees):,} Orbax trees"
    print(f"output: {plan.nbytes:,} bytes of tensors in {what}; {free:,} bytes are free")
    print(
        f"memory: at least {decimal(memory + piece)}, "
        f"{decimal(memory + 2 * workers * piece)} used where --max-ram allows it"
    )
    if plan.nbytes > free:
        print(f"note: {decimal(plan.nbytes - free)} are wanting at {parent}")
    return 0


def _partition(mesh: str, rules: str) -> "Partition | None":
    """Devices that are not there, from 'expert=8,tensor=4'."""
    from jax.sharding import AbstractMesh

    from mmx.placement import RULES
    from sharding import Partition
    from sharding.mesh import AXES

    sizes = dict.fromkeys(AXES, 1)
    for item in filter(None, mesh.split(",")):
        axis, _, number = item.partition("=")
        if axis not in AXES or not number.isdigit() or not 0 < int(number) < 1 << 20:
            raise ValueError(
                f"--mesh {mesh}: {item!r} is not axis=number; axes are {', '.join(AXES)}"
            )
        sizes[axis] = int(number)
    if not mesh:
        return None
    return Partition(AbstractMesh(tuple(sizes.values()), AXES), RULES[rules])
