"""The plan of a conversion: every tensor of the output, where it comes from, and what it costs.

Made from headers alone, so that `mmx convert --dry-run` takes seconds for any size. `pieces` reads
and turns what the plan names, `stream` writes it.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mmx.convert import decay_tables, mapping
from mmx.convert.checkpoint import MAX_SHARDS
from mmx.convert.chunks import DTYPES, ArrayLayout, choose_chunk
from mmx.convert.documents import (
    Dtype,
    To,
    carried_files,
    output_fields,
    written_documents,
)
from mmx.convert.mapping import Entry, Layout
from mmx.convert.safetensors_file import DTYPE_NAMES
from mmx.convert.safetensors_writer import aligned_order
from mmx.convert.source import CARRIED, PARAMS, PIECE, Source, Stored, piece_bytes
from mmx.model import param_specs
from mmx.nn.layers import ParamSpec
from sharding import Partition, rules

WHOLE = 4 << 20  # bytes up to which an array is one chunk
_CAST = {"bf16": np.dtype(jnp.bfloat16), "fp32": np.dtype(np.float32)}
_Choose = Callable[[str, list[Entry]], np.dtype]
_VERSION = 1  # of what a plan means; raise it when the bytes of an output change


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion, as far as it decides about the bytes of the output.

    Attributes:
      to: the form to write.
      dtype: 'as-is' keeps what is stored; 'bf16' rounds all but the routers; 'fp32' widens.
      shard_size: bytes of tensors in a file of Hugging Face's forms; a larger tensor has its own.
      experts: layout of transformers' form; None keeps the source's.
      partition: over whose devices Orbax chunks are cut so that each device reads its own.
      allow_missing, allow_extra: patterns of keys; see `open_source`.
    """

    to: To
    dtype: Dtype = "as-is"
    shard_size: int = 5_000_000_000
    experts: Layout | None = None
    partition: Partition | None = None
    allow_missing: tuple[str, ...] = ()
    allow_extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A tensor of the output.

    Attributes:
      stored: dtype and shape.
      kind: of parameters, carried from the source as it is, or a decay table that is computed.
      entries: of parameters, the parts in the order of their bytes.
      table: of a decay table, (layer, name).
    """

    stored: Stored
    kind: Literal["parameter", "carried", "table"]
    entries: tuple[Entry, ...] = ()
    table: tuple[int, str] = (-1, "")


@dataclass(frozen=True)
class Plan:
    """A conversion, decided.

    Attributes:
      source: what is read.
      options: as asked.
      shards: of Hugging Face's forms: file -> names of its tensors, in the order of their bytes.
      tensors: of Hugging Face's forms, by name.
      trees: of Orbax: 'params' and perhaps 'carried' -> arrays by path.
      documents: files that are made, by name.
      files: names of files that are copied.
      notes: what the reader should know.
    """

    source: Source
    options: Options
    shards: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, Tensor]
    trees: Mapping[str, Mapping[str, ArrayLayout]]
    documents: Mapping[str, bytes]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        arrays = sum(layout.nbytes for tree in self.trees.values() for layout in tree.values())
        return arrays + sum(tensor.stored.nbytes for tensor in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of the output depend on, as JSON values.

        Two conversions with the same identity write the same bytes.
        """
        options = self.options
        asked: dict[str, Any] = {"to": options.to, "dtype": options.dtype}
        if options.to == "orbax":
            partition = options.partition
            asked["mesh"] = {} if partition is None else dict(partition.mesh.shape)
            asked["rules"] = None if partition is None else partition.rules.name
        else:
            asked |= {"shard_size": options.shard_size, "experts": self._layout}
        asked |= {"allow_missing": options.allow_missing, "allow_extra": options.allow_extra}
        listing = json.dumps([[name, *map(str, _signature(name, self))] for name in _names(self)])
        copied = [self.source.folder / name for name in self.files]
        return json.loads(
            json.dumps(
                {
                    "version": _VERSION,
                    "options": asked,
                    "tensors": hashlib.sha256(listing.encode()).hexdigest(),
                    "source": {
                        str(path.relative_to(self.source.folder)): _stamp(path)
                        for path in (*self.source.files, *copied)
                        if path.is_file()
                    },
                }
            )
        )

    @property
    def _layout(self) -> Layout:
        return output_layout(self.source, self.options)


def _stamp(path: Path) -> str:
    seen = path.stat()
    return f"{seen.st_size} bytes of {seen.st_mtime_ns}"


def _names(plan: Plan) -> list[str]:
    return [*plan.tensors, *(f"{tree}/{name}" for tree in plan.trees for name in plan.trees[tree])]


def _signature(name: str, plan: Plan) -> tuple[Any, ...]:
    if name in plan.tensors:
        stored = plan.tensors[name].stored
        return stored.dtype, stored.shape
    tree, _, path = name.partition("/")
    layout = plan.trees[tree][path]
    return layout.dtype, layout.shape, layout.chunk


def output_layout(source: Source, options: Options) -> Layout:
    """How the experts are written in a form of Hugging Face."""
    if options.to == "hf-released":
        if options.experts == "fused":
            raise ValueError(
                "--experts fused: the released code knows separate experts alone; use --to hf"
            )
        return "separate"
    return options.experts or source.layout


def make_plan(source: Source, options: Options) -> Plan:
    """Decide what a conversion writes.

    Args:
      source: opened with the same patterns.
      options: what is asked.

    Raises:
      ValueError: the form cannot hold this checkpoint; file or key and remedy are named.
    """
    notes = [f"{key}: missing, and left out" for key in source.missing]
    notes += [f"{key}: dropped ({reason})" for key, reason in source.dropped.items()]
    specs = param_specs(source.config)
    choose = functools.partial(_output_dtype, source, options.dtype, specs, notes)
    main = choose(
        "embed/embedding", [e for e in source.entries.values() if e.path.startswith("embed")]
    )
    fields, said = output_fields(source, options.to, options.dtype, main.name)
    notes += said
    tensors: dict[str, Tensor] = {}
    shards: dict[str, tuple[str, ...]] = {}
    trees: dict[str, dict[str, ArrayLayout]] = {}
    if options.to == "orbax":
        trees[PARAMS] = _arrays(source, options, specs, choose)
        if source.carried:
            trees[CARRIED] = _carried_arrays(source)
    else:
        tensors = _tensors(source, options, fields, choose, notes)
        shards = _shards(tensors, options.shard_size)
    if options.dtype == "bf16":
        notes.append("routers keep their dtype: they are never rounded")
    if options.dtype != "as-is" and source.carried:
        notes.append("tensors that are no parameters of the text model keep their dtype")
    files = carried_files(source.folder)
    documents = written_documents(source, fields, options.to, files)
    return Plan(source, options, shards, tensors, trees, documents, tuple(files), tuple(notes))


def _output_dtype(
    source: Source,
    asked: Dtype,
    specs: Mapping[str, Any],
    notes: list[str],
    name: str,
    entries: list[Entry],
) -> np.dtype:
    """The dtype of a tensor or array that these parts of a parameter make up."""
    if not entries:
        return np.dtype(np.float32)
    kinds = sorted({source.dtype(entry) for entry in entries}, key=str)
    widest = np.dtype(functools.reduce(jnp.promote_types, kinds))
    spec = mapping.find(specs, entries[0].path)
    assert spec is not None
    if asked != "as-is" and not (asked == "bf16" and spec.fp32):
        return _CAST[asked]
    note = f"{name}: stored as {' and '.join(map(str, kinds))}, becomes {widest}"
    if len(kinds) > 1 and note not in notes:
        notes.append(note)
    return widest


# ---------------------------------------------------------------- Orbax


def _arrays(
    source: Source, options: Options, specs: Mapping[str, Any], choose: Any
) -> dict[str, ArrayLayout]:
    arrays: dict[str, ArrayLayout] = {}
    for path, group in source.by_path.items():
        spec = mapping.find(specs, path)
        assert spec is not None
        wanted = math.prod(spec.shape[: len(group[0].index)])
        if len(group) != wanted:
            raise ValueError(
                f"{source.folder}: {wanted - len(group)} of {wanted} parts of {path} are missing; "
                "an array is whole or left out: allow all of them to be missing, or none"
            )
        dtype = choose(path, group)
        arrays[path] = ArrayLayout(
            spec.shape, dtype.name, _chunk(path, spec, dtype.itemsize, group[0], options.partition)
        )
    return dict(sorted(arrays.items()))


def _chunk(
    path: str, spec: ParamSpec, itemsize: int, entry: Entry, partition: Partition | None
) -> tuple[int, ...]:
    divide: tuple[int, ...] = ()
    if partition is not None:
        try:
            split = partition.spec(spec.axes, spec.shape, name=path)
        except ValueError as error:
            raise ValueError(f"--mesh: {error}") from None
        sizes = partition.mesh.shape
        divide = tuple(math.prod(sizes[axis] for axis in rules.names(over)) for over in split)
    if max(divide, default=1) == 1 and math.prod(spec.shape) * itemsize <= WHOLE:
        return spec.shape
    stacked = len(entry.index)
    return choose_chunk(
        spec.shape, itemsize, stacked=stacked, max_bytes=piece_bytes(entry, itemsize),
        divide=divide, cut=stacked + entry.cut,
    )  # fmt: skip


def _carried_arrays(source: Source) -> dict[str, ArrayLayout]:
    arrays: dict[str, ArrayLayout] = {}
    for key, stored in sorted(source.carried.items()):
        if "/" in key:
            raise ValueError(f"{source.folder}: {key}: '/' cannot be part of a name in Orbax")
        if stored.dtype.name not in DTYPES or not stored.nbytes:
            raise ValueError(
                f"{source.folder}: {key}: is empty or has a dtype that Orbax cannot hold; remove "
                "it, or dequantize it first"
            )
        chunk = stored.shape and choose_chunk(
            stored.shape, stored.dtype.itemsize, stacked=0, max_bytes=PIECE, cut=0
        )
        arrays[key.replace(".", "/")] = ArrayLayout(stored.shape, stored.dtype.name, chunk)
    return arrays


# ---------------------------------------------------------------- Hugging Face


def _tensors(
    source: Source, options: Options, fields: Mapping[str, Any], choose: _Choose, notes: list[str]
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of Hugging Face, in the order of the files."""
    prefix = mapping.VL_TEXT_PREFIX if "text_config" in fields else ""
    groups: dict[str, list[Entry]] = {}
    absent: set[str] = set()
    for entry in mapping.entries(source.config, output_layout(source, options)):
        groups.setdefault(entry.key, [])
        if source.has(entry):
            groups[entry.key].append(entry)
        else:
            absent.add(entry.key)
    tensors: dict[str, Tensor] = {}
    for key, group in groups.items():
        if key in absent and group:
            raise ValueError(
                f"{source.folder}: parts of {key} are missing, and it cannot be written without "
                "them; use --experts separate, or allow all of them to be missing"
            )
        if group:
            # Experts in turn, the gate's rows before those of the up projection.
            group.sort(key=lambda e: [p.start if isinstance(p, slice) else p for p in e.key_slice])
            stored = Stored(choose(key, group), group[0].key_shape)
            tensors[prefix + key] = Tensor(stored, "parameter", tuple(group))
    tables = [k for k in source.carried if mapping.BUFFERS.fullmatch(k.removeprefix(prefix))]
    for key in source.carried:
        if key in tables and options.to == "hf-released":
            continue
        if source.carried[key].dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{source.folder}: {key}: has a dtype that cannot be carried; dequantize it first"
            )
        tensors[key] = Tensor(source.carried[key], "carried")
    if options.to == "hf":
        tensors |= _computed_tables(source, notes)
    elif tables:
        notes.append(f"{len(tables)} decay tables are dropped: the released code computes them")
    return tensors


def _computed_tables(source: Source, notes: list[str]) -> dict[str, Tensor]:
    config = source.config
    tables: dict[str, Tensor] = {}
    for layer, kind in enumerate(config.layer_kinds):
        for name in decay_tables.NAMES if kind == "lightning" else ():
            key = decay_tables.key(layer, name)
            if key not in source.carried:
                stored = Stored(np.dtype(np.float32), decay_tables.shape(config, name))
                tables[key] = Tensor(stored, "table", table=(layer, name))
    if tables:
        notes.append(f"{len(tables)} decay tables are computed: transformers wants them stored")
    return tables


def _shards(tensors: Mapping[str, Tensor], shard_size: int) -> dict[str, tuple[str, ...]]:
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if tensor.stored.nbytes > room or not groups:
            groups.append([])
            room = shard_size
        groups[-1].append(name)
        room -= tensor.stored.nbytes
    if len(groups) > MAX_SHARDS:
        raise ValueError(
            f"--shard-size: makes {len(groups):,} files, and at most {MAX_SHARDS:,} are read "
            "again; give a larger size"
        )
    shards: dict[str, tuple[str, ...]] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        described = {n: (DTYPE_NAMES[(t := tensors[n].stored).dtype], t.shape) for n in names}
        shards["model.safetensors" if len(groups) == 1 else file] = tuple(aligned_order(described))
    return shards
