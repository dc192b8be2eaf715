"""Safetensors of Hugging Face as a source: the released layout and that of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmx.config import ModelConfig
from mmx.convert import decay_tables, mapping
from mmx.convert.checkpoint import SUPPORTED_DTYPES, SafetensorsFolder
from mmx.convert.hf_config import TRANSFORMERS_TYPE
from mmx.convert.mapping import Entry, Layout
from mmx.convert.safetensors_file import DTYPES
from mmx.convert.source import (
    ALLOWED,
    Allowed,
    Source,
    Stored,
    require_sane,
    row_ranges,
    rows_at_once,
    some,
)


@dataclass(frozen=True)
class _Safetensors:
    folder: SafetensorsFolder

    def dtype(self, entry: Entry) -> np.dtype:
        return DTYPES[self.folder.tensors[entry.key].dtype]

    def rows(self, entry: Entry) -> int:
        return rows_at_once(entry, self.dtype(entry).itemsize)

    def decoded(self, entry: Entry) -> int:
        return 0

    def read(self, entry: Entry, box: tuple[slice, ...]) -> np.ndarray:
        return self.folder.read(entry.key, entry.locate(box))

    def read_carried(self, key: str, part: tuple[int | slice, ...]) -> np.ndarray:
        return self.folder.read(key, part)


def open_hf(folder: Path, fields: dict[str, Any], config: ModelConfig, allowed: Allowed) -> Source:
    """A folder of safetensors, its tensors matched with those the config needs."""
    checkpoint = SafetensorsFolder(folder, allowed.limits)
    names = _text_names(checkpoint)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    layout: Layout = "fused" if fused else "separate"
    found, missing = _match(checkpoint, config, folder, names, layout, allowed)
    needed = {entry.key for entry in found.values()}
    carried: dict[str, Stored] = {}
    dropped: dict[str, str] = {}
    extra: list[str] = []
    for key in sorted(set(checkpoint.tensors) - needed):
        text = key.removeprefix(mapping.VL_TEXT_PREFIX)
        vision = mapping.VL_VISION.match(key) and key not in names
        if vision or _is_decay_table(text, checkpoint.tensors[key].shape, config):
            carried[key] = _carried(checkpoint, key)
        elif _is_tied_head(checkpoint, key, config, allowed.read_data):
            dropped[key] = "the embedding again"
        elif allowed.may_have(key):
            dropped[key] = ALLOWED
        else:
            extra.append(key)
    if extra:
        raise ValueError(
            f"{checkpoint.tensors[extra[0]].file}: {some(extra)} unexpected; "
            "the config has no place for it: correct config.json or remove it"
        )
    prefixed = any(key.startswith(mapping.VL_TEXT_PREFIX) for key in needed)
    form = "hf" if fields.get("model_type") == TRANSFORMERS_TYPE else "hf-released"
    shards = sorted({info.file for info in checkpoint.tensors.values()})
    return Source(
        folder, form, config, fields, layout, mapping.VL_TEXT_PREFIX if prefixed else "", found,
        carried, dropped, tuple(missing), _Safetensors(checkpoint),
        (folder / "config.json", *shards),
    )  # fmt: skip


def _match(
    checkpoint: SafetensorsFolder,
    config: ModelConfig,
    folder: Path,
    names: Mapping[str, str],
    layout: Layout,
    allowed: Allowed,
) -> tuple[dict[tuple[str, tuple[int, ...]], Entry], list[str]]:
    """The entries of the tensors there are, and keys that are not and may miss."""
    found: dict[tuple[str, tuple[int, ...]], Entry] = {}
    missing: list[str] = []
    left_out: dict[str, None] = {}
    for entry in mapping.entries(config, layout):
        if entry.key in names:
            entry = mapping.with_key(entry, names[entry.key])
            _check(checkpoint, entry)
            found[entry.path, entry.index] = entry
        elif allowed.may_miss(entry.key):
            left_out[entry.key] = None
            require_sane(folder, len(left_out))
        else:
            missing.append(entry.key)
            if len(missing) > len(names):  # the config may ask for any number
                break
    if missing:
        raise ValueError(
            f"{folder}: {some(missing)} missing; the config wants it: download the checkpoint "
            "again, or correct config.json"
        )
    return found, list(left_out)


def _check(checkpoint: SafetensorsFolder, entry: Entry) -> None:
    info = checkpoint.tensors[entry.key]
    if info.shape != entry.key_shape:
        raise ValueError(
            f"{info.file}: {entry.key} has shape {info.shape}; the config wants {entry.key_shape}"
        )
    _check_dtype(checkpoint, entry.key)


def _check_dtype(checkpoint: SafetensorsFolder, key: str) -> None:
    info = checkpoint.tensors[key]
    if info.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{info.file}: {key} has dtype {info.dtype}; supported are "
            f"{', '.join(SUPPORTED_DTYPES)}: dequantize the checkpoint first"
        )


def _is_decay_table(key: str, shape: tuple[int, ...], config: ModelConfig) -> bool:
    if not mapping.BUFFERS.fullmatch(key):
        return False
    layer, name = int(key.split(".")[2]), key.rsplit(".", 1)[1]
    lightning = layer < config.num_layers and config.layer_kinds[layer] == "lightning"
    return lightning and shape == decay_tables.shape(config, name)


def _carried(checkpoint: SafetensorsFolder, key: str) -> Stored:
    info = checkpoint.tensors[key]
    # One of less than a byte an item cannot be read; mmx.load reads none of these.
    return Stored(DTYPES.get(info.dtype, np.dtype(np.void)), info.shape)


def _text_names(checkpoint: SafetensorsFolder) -> dict[str, str]:
    """Names of the text model's tensors without VL-01's prefix -> names in the checkpoint."""
    prefix = mapping.VL_TEXT_PREFIX
    if not any(key.startswith(prefix) for key in checkpoint.tensors):
        return {key: key for key in checkpoint.tensors}
    names: dict[str, str] = {}
    for key in sorted(checkpoint.tensors):
        if mapping.VL_VISION.match(key):
            continue
        short = key.removeprefix(prefix)
        if short in names:
            raise ValueError(
                f"{checkpoint.tensors[key].file}: {short} is there with and without the prefix "
                f"{prefix!r}; remove one of the two"
            )
        names[short] = key
    return names


def _is_tied_head(
    checkpoint: SafetensorsFolder, key: str, config: ModelConfig, read_data: bool
) -> bool:
    """Whether a tensor is the head of a tied model, which says the embedding again."""
    if not config.tie_embeddings or not key.endswith("lm_head.weight"):
        return False
    embedding = key.replace("lm_head.weight", "model.embed_tokens.weight")
    if embedding not in checkpoint.tensors:
        return False
    for name in (key, embedding):
        _check_dtype(checkpoint, name)
    head, table = checkpoint.tensors[key], checkpoint.tensors[embedding]
    rows = row_ranges(table.shape, DTYPES[table.dtype].itemsize)
    same = head.shape == table.shape and all(
        np.array_equal(checkpoint.read(key, (part,)), checkpoint.read(embedding, (part,)))
        for part in (rows if read_data else ())
    )
    if not same:
        raise ValueError(
            f"{head.file}: {key} differs from {embedding}, but the config says "
            "tie_word_embeddings; set it to false"
        )
    return True
