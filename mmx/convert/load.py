"""`mmx.load`: a checkpoint folder of any form -> (config, parameters)."""

import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.convert import mapping
from mmx.convert.mapping import Entry
from mmx.convert.source import Source, is_run, open_source, read_config
from mmx.convert.transposing import to_contiguous
from mmx.model import Params, param_specs
from mmx.nn.layers import ParamSpec
from mmx.nn.quantized import Int8, quantized

_ALIGNMENT = 64  # bytes; XLA takes a host buffer over without a copy when it is aligned
# fp16 has no room for the activations of these models.
_HELD = {np.dtype(np.float16): np.dtype(np.float32)}


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a checkpoint folder, or of the last checkpoint of a training run.

    Raises:
      ValueError: no folder, no config.json, or one that `ModelConfig.from_hf` refuses.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is a folder with a config.json")
    if is_run(folder):
        from mmx.training.runs import run_config

        return run_config(folder)[1]
    return read_config(folder)[1]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any | None = None,
    weights: Literal["int8"] | None = None,
) -> tuple[ModelConfig, Params]:
    """Load a checkpoint: of Hugging Face in either layout, converted to Orbax, or a training run.

    One file or many with an index, separate or fused experts, with or without stored decay tables;
    of a MiniMax-VL-01 folder the text model, with a warning. Everything is checked against the
    headers before any data is read; then memory holds one piece beyond the result, as int8 a few.
    Of the folder of a run (`mmx train`), the fp32 master parameters of its last checkpoint.

    Args:
      path: the folder; nothing outside it is read and nothing in it is run.
      dtype: of the parameters; None keeps what is stored. Router weights become fp32 always.
      weights: 'int8' for inference: matrices of attention and experts are quantised as they are
        read, from what is stored (`mmx.inference.quantize`); `dtype` is then of the rest.

    Returns:
      The config, and the parameters as one nested dict of arrays.

    Raises:
      ValueError: a missing or truncated shard, a missing or unexpected tensor, a wrong shape or
        dtype, a config that is not supported. The message names file, key and remedy.
    """
    folder = Path(path)
    if weights not in (None, "int8"):
        raise ValueError(f"weights is {weights!r}; it must be 'int8', or None for those stored")
    wanted = None if dtype is None else _float_dtype(dtype)
    if is_run(folder) and weights is None:
        from mmx.training.runs import load_run

        return load_run(folder, dtype=wanted)
    source = open_source(folder)
    if source.form == "run":
        source.check()
    vision = [key for key in source.carried if mapping.VL_VISION.match(key)]
    if vision:
        warnings.warn(
            f"{folder}: {len(vision)} tensors of the vision model are not loaded", stacklevel=2
        )
    leaves = {}
    specs = param_specs(source.config)
    for name, group in source.by_path.items():
        spec = mapping.find(specs, name)
        assert spec is not None
        if weights == "int8" and spec.inputs:
            leaves[name] = _read_int8(source, group, spec)
        else:
            leaves[name] = _read_leaf(source, group, spec, wanted)
    return source.config, _nest(leaves)


def _float_dtype(dtype: Any) -> np.dtype:
    resolved = jnp.dtype(dtype)
    if resolved not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"dtype is {resolved}; it must be float32 or bfloat16")
    return resolved


def _read_leaf(
    source: Source, group: list[Entry], spec: ParamSpec, wanted: np.dtype | None
) -> jax.Array:
    # One array holds all layers: of several stored dtypes it takes the wider.
    kinds = [_HELD.get(source.dtype(entry), source.dtype(entry)) for entry in group]
    stored = jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, kinds))
    dtype = np.dtype(np.float32) if spec.fp32 else wanted or stored
    buffer = _aligned(spec.shape, dtype)
    for entry in group:
        for rows in source.pieces(entry):
            region = buffer[(*entry.index, *entry.region(rows))]
            part = source.read(entry, (rows,))
            region[...] = entry.to_param(part, region.shape).astype(dtype, copy=False)
    return jnp.asarray(buffer)


def _read_int8(source: Source, group: list[Entry], spec: ParamSpec) -> Int8:
    ones = (1 if axis in spec.inputs else size for axis, size in enumerate(spec.shape))
    values = _aligned(spec.shape, np.dtype(np.int8))
    scale = _aligned(tuple(ones), np.dtype(np.float32))
    for entry in group:
        for rows in source.pieces(entry):
            # A stored row is an output channel with all its inputs, so a piece stands for itself.
            piece = quantized(source.read(entry, (rows,)), (1,))
            for buffer, part in ((values, piece.values), (scale, piece.scale)):
                region = buffer[(*entry.index, *entry.region(rows))]
                region[...] = to_contiguous(entry.to_param(part, region.shape))
    return Int8(jnp.asarray(values), jnp.asarray(scale))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, jax.Array | Int8]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
