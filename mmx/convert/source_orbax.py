"""Orbax trees as sources: a folder converted by `mmx convert`, and the folder of a training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmx import integrity
from mmx.config import ModelConfig
from mmx.convert import mapping
from mmx.convert.checkpoint import SUPPORTED_DTYPES
from mmx.convert.chunks import DTYPES
from mmx.convert.mapping import Entry
from mmx.convert.orbax_store import TreeReader
from mmx.convert.safetensors_file import DTYPES as FORMAT_DTYPES
from mmx.convert.source import (
    ALLOWED,
    CARRIED,
    CHECKPOINTS,
    PARAMS,
    Allowed,
    Source,
    Stored,
    require_sane,
    rows_at_once,
    some,
)
from mmx.model import param_specs
from mmx.training.folders import step_folders
from mmx.training.runs import run_config

_SUPPORTED = {FORMAT_DTYPES[name].name for name in SUPPORTED_DTYPES}


@dataclass(frozen=True)
class _Orbax:
    params: TreeReader
    carried: TreeReader | None
    above: str = ""  # what the tree has above the names of parameters

    whole_chunks: bool = False  # what others wrote is decoded a chunk at a time

    def dtype(self, entry: Entry) -> np.dtype:
        return DTYPES[self.params.arrays[self.above + entry.path].dtype]

    def rows(self, entry: Entry) -> int:
        layout = self.params.arrays[self.above + entry.path]
        chunk = layout.chunk[len(entry.index) :]
        # A chunk is read whole; larger ones, as of other writers, again for each piece.
        most = rows_at_once(entry, DTYPES[layout.dtype].itemsize)
        return min(chunk[entry.cut] * entry.row_unit, most) if chunk else most

    def decoded(self, entry: Entry) -> int:
        return self.params.arrays[self.above + entry.path].chunk_nbytes if self.whole_chunks else 0

    def read(self, entry: Entry, box: tuple[slice, ...]) -> np.ndarray:
        if not box:
            return entry.from_param(self.params.read(self.above + entry.path, entry.index))
        region = entry.region(box[0])
        part = entry.from_param(self.params.read(self.above + entry.path, (*entry.index, *region)))
        return part[(slice(None), *box[1:])]

    def read_carried(self, key: str, part: tuple[int | slice, ...]) -> np.ndarray:
        assert self.carried is not None
        return self.carried.read(key.replace(".", "/"), part)


def open_orbax(
    folder: Path, fields: dict[str, Any], config: ModelConfig, allowed: Allowed
) -> Source:
    """A converted folder, after comparing names and sizes with its manifest."""
    manifest = integrity.check_files(folder)
    carried = TreeReader(folder / CARRIED) if (folder / CARRIED).is_dir() else None
    store = _Orbax(TreeReader(folder / PARAMS), carried)
    found, missing, dropped = _match_arrays(folder / PARAMS, store, config, allowed)
    kept = {}
    if carried is not None:
        for name, layout in carried.arrays.items():
            kept[name.replace("/", ".")] = Stored(DTYPES[layout.dtype], layout.shape)
    prefix = mapping.VL_TEXT_PREFIX if "text_config" in fields else ""
    files = (folder / integrity.MANIFEST, *(folder / name for name in manifest.files))
    return Source(folder, "orbax", config, fields, "separate", prefix, found, kept, dropped,
                  tuple(missing), store, files)  # fmt: skip


def open_run(folder: Path, allowed: Allowed) -> Source:
    """The parameters of the last complete step of a run."""
    step, config = run_config(folder)
    saved = step_folders(folder / CHECKPOINTS)[step]
    store = _Orbax(TreeReader(saved / PARAMS), None, f"{PARAMS}/", whole_chunks=True)
    found, missing, dropped = _match_arrays(saved / PARAMS, store, config, allowed)
    return Source(folder, "run", config, None, "separate", "", found, {}, dropped, tuple(missing),
                  store, (saved, saved / integrity.MANIFEST))  # fmt: skip


def _match_arrays(
    folder: Path, store: _Orbax, config: ModelConfig, allowed: Allowed
) -> tuple[dict[tuple[str, tuple[int, ...]], Entry], list[str], dict[str, str]]:
    """Entries of the arrays there are, paths that may miss, and arrays that may be too many."""
    specs = param_specs(config)
    arrays = {name.removeprefix(store.above): a for name, a in store.params.arrays.items()}
    found: dict[tuple[str, tuple[int, ...]], Entry] = {}
    missing: dict[str, None] = {}
    absent = 0
    for entry in mapping.entries(config, "separate"):
        if entry.path not in arrays:
            missing[entry.path] = None
            absent += 1
            require_sane(folder, absent)
            continue
        shape, dtype = arrays[entry.path].shape, arrays[entry.path].dtype
        spec = mapping.find(specs, entry.path)
        assert spec is not None
        if shape != spec.shape:
            raise ValueError(
                f"{folder}: {entry.path} has shape {shape}; the config wants {spec.shape}"
            )
        if dtype not in _SUPPORTED:
            raise ValueError(
                f"{folder}: {entry.path} has dtype {dtype}; supported are floats of 16 to 64 bits"
            )
        found[entry.path, entry.index] = entry
    needed = {path for path, _ in found}
    lost = [path for path in missing if not allowed.may_miss(path)]
    if lost:
        raise ValueError(
            f"{folder}: {some(lost)} missing; the config wants it: convert the checkpoint "
            "again, or correct config.json"
        )
    extra = [path for path in arrays if path not in needed]
    unexpected = [path for path in extra if not allowed.may_have(path)]
    if unexpected:
        raise ValueError(
            f"{folder}: {some(unexpected)} unexpected; the config has no place for it: correct "
            "config.json or convert again"
        )
    return found, list(missing), dict.fromkeys(extra, ALLOWED)
