"""What commands that run a model share: options, loading, the memory it will take."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from mmx.config import ModelConfig
    from mmx.inference.engine import Engine
    from mmx.inference.requests import Sampling
    from mmx.model import Params
    from sharding import Partition

PAGE = 256  # tokens
_CONTROL = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


@dataclass(frozen=True, kw_only=True)
class Loading:
    """In what a checkpoint is loaded and where, and what is kept of a text."""

    dtype: Literal["as-stored", "fp32", "bf16"] = "as-stored"
    """Of parameters and activations; state, router and logits are fp32 always."""
    weights: Literal["as-stored", "int8"] = "as-stored"
    """int8 halves the memory of bf16 matrices: one scale a channel."""
    kv_dtype: Literal["as-activations", "bf16", "fp8"] = "as-activations"
    """Of keys and values; fp8 halves bf16, and puts each off by at most 1/16 of itself."""
    mesh: str = ""
    """axis=n,...: devices of this machine that share the model and its memory: experts and heads
    over expert and tensor; keys and values over seq, which reads long texts slower on GPUs. One
    device without."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How tokens are chosen."""

    max_new_tokens: int = 32
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability together reaches this."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there before; 1 changes nothing."""
    seed: int = 0
    """Of the random draws."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT"), tyro.conf.UseAppendAction] = ()
    """The text ends before this one; may be given again."""
    ignore_eos: bool = False
    """Go on after the model's end token."""


def sampling_of(options: Choices) -> "Sampling":
    """The same as the engine knows it; not checked yet."""
    from mmx.inference.requests import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )


def partition_of(options: Loading, config: "ModelConfig") -> "Partition | None":
    """The devices of --mesh, as many of the first as it takes; None is one.

    Raises:
      ValueError: no such mesh here, or one that cannot share this model.
    """
    if not options.mesh:
        return None
    import jax

    from mmx.placement import make_partition
    from mmx.planning.topology import parse_mesh

    mesh = parse_mesh(options.mesh, fsdp=1)
    if (mesh.data, mesh.fsdp) != (1, 1):
        raise ValueError(
            f"--mesh {options.mesh}: an engine has its rows on all devices, so data and fsdp are "
            "1; give expert, seq and tensor"
        )
    sizes = asdict(mesh).values()
    devices = jax.devices()
    if -1 not in sizes and math.prod(sizes) < len(devices):
        devices = devices[: math.prod(sizes)]
    return make_partition(mesh, "serving", config, devices=devices)


def load_model(
    path: Path, options: Loading, partition: "Partition | None"
) -> "tuple[ModelConfig, Params]":
    """Config and parameters as the options want them, where the partition has them."""
    import jax.numpy as jnp

    import mmx

    dtype = {"as-stored": None, "fp32": jnp.float32, "bf16": jnp.bfloat16}[options.dtype]
    weights = "int8" if options.weights == "int8" else None
    return mmx.load(path, dtype=dtype, weights=weights, partition=partition)


@contextmanager
def memory_explained(
    path: Path,
    config: "ModelConfig",
    options: Loading,
    room: "Room",
    partition: "Partition | None",
) -> Iterator[None]:
    """Loading a model and running it: memory that runs out is a table on stderr and one line.

    Raises:
      MemoryExhausted: a ValueError; instead of the runtime's error.
    """
    from mmx.planning.exhausted import explained, of_checkpoint

    def ask():
        dtype = {"as-stored": None, "fp32": "float32", "bf16": "bfloat16"}[options.dtype]
        return of_checkpoint(
            config, dtype or _stored_dtype(path), int8=options.weights == "int8",
            rows=room.rows, tokens=room.pages * room.page_size, partition=partition,
        )  # fmt: skip

    with explained(ask):
        yield


def _stored_dtype(path: Path) -> str:
    from mmx.convert.leaves import stored_dtype
    from mmx.convert.source import is_run, open_source

    if is_run(path):
        return "float32"
    source = open_source(path)
    return str(stored_dtype(source, source.by_path["embed/embedding"]))


def kv_dtype_of(options: Loading) -> str | None:
    """The same as the engine knows it."""
    return {"as-activations": None, "bf16": "bfloat16", "fp8": "float8_e4m3fn"}[options.kv_dtype]


@dataclass(frozen=True)
class Room:
    """What an engine is made with; see `Engine`."""

    rows: int
    pages: int
    page_size: int
    max_seq_len: int
    chunk: int
    decode_steps: int
    snapshots: int
    kv_dtype: str | None

    def engine(self, config: "ModelConfig", params: "Params", **more) -> "Engine":
        """An engine with this room."""
        from mmx.inference.engine import Engine

        return Engine(config, params, **asdict(self), **more)


def check_memory(
    config: "ModelConfig",
    params: "Params",
    room: Room,
    partition: "Partition | None",
    *,
    show: bool = False,
) -> None:
    """Refuse what a device has no memory for, before any of it is taken; print it if asked to.

    Raises:
      ValueError: it needs more than there is; says how many tokens there is room for.
    """
    from mmx.inference.memory_plan import device_memory, pages_within, plan_engine

    there = device_memory()
    if there is None and not show:
        return
    plan = plan_engine(config, params, partition=partition, **asdict(room))
    if show:
        _print_plan(plan.lines(), there, 1 if partition is None else partition.mesh.size)
    if there is not None and plan.total > there:
        # An engine has pages for as many devices as share them.
        shared = 1 if partition is None else partition.devices_of("pages")
        most = pages_within(there, plan, -(-room.pages // shared) * shared) // shared * shared
        raise ValueError(
            f"{plan.total:,} bytes of memory are needed and a device has {there:,}; keys and "
            f"values of {most * room.page_size:,} tokens fit, {room.pages * room.page_size:,} are "
            "asked for"
        )


def _print_plan(lines: Sequence[tuple[str, int]], there: int | None, devices: int) -> None:
    from rich.filesize import decimal

    parts = ", ".join(f"{name} {decimal(size)}" for name, size in lines)
    of = "" if there is None else f" of {decimal(there)}"
    each = f" on each of {devices} devices" if devices > 1 else ""
    print(f"mmx: memory: {parts}{of}{each}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Text of a model to stdout, at once; on a terminal it cannot move the cursor."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on stderr."""
    text = " ".join(text.split())
    print(f"mmx: note: {text if text.isprintable() else ascii(text)}", file=sys.stderr, flush=True)
