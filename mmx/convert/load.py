"""`mmx.load`: a Hugging Face folder -> (config, parameters)."""

import functools
import math
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.convert import mapping
from mmx.convert.checkpoint import SUPPORTED_DTYPES, SafetensorsFolder, printable, read_json
from mmx.model import Params, param_specs
from mmx.nn.layers import ParamSpec

_ALIGNMENT = 64  # bytes; XLA takes a host buffer over without a copy when it is aligned
_NUMPY_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float32),  # fp16 has no room for the activations of these models
    "BF16": np.dtype(jnp.bfloat16),
}


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a checkpoint folder, or of the last checkpoint of a training run.

    Raises:
      ValueError: no folder, no config.json, or one that `ModelConfig.from_hf` refuses.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is a folder with a config.json")
    if _is_run(folder):
        from mmx.training.runs import run_config

        return run_config(folder)[1]
    fields = read_json(folder, "config.json")
    try:
        return ModelConfig.from_hf(fields)
    except ValueError as error:
        reason = printable(str(error).removeprefix("config.json: "))
        raise ValueError(f"{folder / 'config.json'}: {reason}") from None


def load(path: str | os.PathLike[str], *, dtype: Any | None = None) -> tuple[ModelConfig, Params]:
    """Load a checkpoint folder in the released or the transformers layout, or a training run.

    One file or many with an index, separate or fused experts, with or without stored decay tables;
    of a MiniMax-VL-01 folder the text model, with a warning. Everything is checked against the
    headers before any data is read; then memory holds one tensor beyond the result. Of the folder
    of a run (`mmx train`), the fp32 master parameters of its last checkpoint.

    Args:
      path: the folder; nothing outside it is read and nothing in it is run.
      dtype: of the parameters; None keeps what is stored. Router weights become fp32 always.

    Returns:
      The config, and the parameters as one nested dict of arrays.

    Raises:
      ValueError: a missing or truncated shard, a missing or unexpected tensor, a wrong shape or
        dtype, a config that is not supported. The message names file, key and remedy.
    """
    folder = Path(path)
    if _is_run(folder):
        from mmx.training.runs import load_run

        return load_run(folder, dtype=None if dtype is None else _float_dtype(dtype))
    config = load_config(folder)
    wanted = None if dtype is None else _float_dtype(dtype)
    checkpoint = SafetensorsFolder(folder)
    by_path = defaultdict(list)
    for entry in _plan(checkpoint, config, folder):
        by_path[entry.path].append(entry)
    leaves = {}
    specs = param_specs(config)
    for name, group in by_path.items():
        spec = mapping.find(specs, name)
        assert spec is not None
        leaves[name] = _read_leaf(checkpoint, group, spec, wanted)
    return config, _nest(leaves)


def _is_run(folder: Path) -> bool:
    """A folder of checkpoints of our own; whoever has both means the Hugging Face one."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").exists()


def _float_dtype(dtype: Any) -> np.dtype:
    resolved = jnp.dtype(dtype)
    if resolved not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"dtype is {resolved}; it must be float32 or bfloat16")
    return resolved


def _plan(
    checkpoint: SafetensorsFolder, config: ModelConfig, folder: Path
) -> list["mapping.Entry"]:
    """Match the tensors there are with the tensors the config needs; raise on any difference."""
    names = _text_names(checkpoint, folder)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    entries, missing = [], []
    for entry in mapping.entries(config, "fused" if fused else "separate"):
        if entry.key not in names:
            missing.append(entry.key)
            if len(missing) > len(names):  # the config may ask for any number
                break
            continue
        entries.append(mapping.with_key(entry, names[entry.key]))
        _check(checkpoint, entries[-1])
    if missing:
        raise ValueError(
            f"{folder}: {_some(missing)} missing; the config wants it: download the checkpoint "
            "again, or correct config.json"
        )
    needed = {entry.key for entry in entries}
    extra = sorted(set(names.values()) - needed)
    extra = [key for key in extra if not _redundant(checkpoint, key, config)]
    if extra:
        raise ValueError(
            f"{checkpoint.tensors[extra[0]].file}: {_some(extra)} unexpected; "
            "the config has no place for it: correct config.json or remove it"
        )
    return entries


def _check(checkpoint: SafetensorsFolder, entry: "mapping.Entry") -> None:
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


def _text_names(checkpoint: SafetensorsFolder, folder: Path) -> dict[str, str]:
    """Names of the text model's tensors without VL-01's prefix -> names in the checkpoint."""
    prefix = mapping.VL_TEXT_PREFIX
    if not any(key.startswith(prefix) for key in checkpoint.tensors):
        return {key: key for key in checkpoint.tensors}
    vision = [key for key in checkpoint.tensors if mapping.VL_VISION.match(key)]
    if vision:
        warnings.warn(
            f"{folder}: {len(vision)} tensors of the vision model are not loaded", stacklevel=4
        )
    names: dict[str, str] = {}
    for key in sorted(set(checkpoint.tensors) - set(vision)):
        short = key.removeprefix(prefix)
        if short in names:
            raise ValueError(
                f"{checkpoint.tensors[key].file}: {short} is there with and without the prefix "
                f"{prefix!r}; remove one of the two"
            )
        names[short] = key
    return names


def _redundant(checkpoint: SafetensorsFolder, key: str, config: ModelConfig) -> bool:
    """Whether a tensor says again what is known: a decay table, or the head of a tied model."""
    if mapping.BUFFERS.fullmatch(key.removeprefix(mapping.VL_TEXT_PREFIX)):
        return True
    if not config.tie_embeddings or not key.endswith("lm_head.weight"):
        return False
    embedding = key.replace("lm_head.weight", "model.embed_tokens.weight")
    if embedding not in checkpoint.tensors:
        return False
    for name in (key, embedding):
        _check_dtype(checkpoint, name)
    if not np.array_equal(checkpoint.read(key), checkpoint.read(embedding)):
        raise ValueError(
            f"{checkpoint.tensors[key].file}: {key} differs from {embedding}, but the config says "
            "tie_word_embeddings; set it to false"
        )
    return True


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{printable(keys[0])}{more} {'are' if more else 'is'}"


def _read_leaf(
    checkpoint: SafetensorsFolder,
    group: list["mapping.Entry"],
    spec: ParamSpec,
    wanted: np.dtype | None,
) -> jax.Array:
    # One array holds all layers: of several stored dtypes it takes the wider.
    kinds = [_NUMPY_DTYPES[checkpoint.tensors[entry.key].dtype] for entry in group]
    stored = jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, kinds))
    dtype = np.dtype(np.float32) if spec.fp32 else wanted or stored
    buffer = _aligned(spec.shape, dtype)
    for entry in group:
        part = entry.to_param(checkpoint.read(entry.key, entry.key_slice))
        buffer[entry.index] = part.astype(dtype, copy=False)
    return jnp.asarray(buffer)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, jax.Array]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
