"""`mmx.load`: a checkpoint folder of any form -> (config, parameters)."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.convert import mapping
from mmx.convert.leaves import Leaf, read_leaf, stored_dtype
from mmx.convert.source import is_run, open_source, read_config
from mmx.model import Params, param_specs
from mmx.nn.quantized import Int8
from sharding import Partition


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
    partition: Partition | None = None,
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
      partition: a mesh and rules by which the parameters are spread as they are read: each device's
        share is read for it, and the host holds one share and a piece. None is the default device.

    Returns:
      The config, and the parameters as one nested dict of arrays.

    Raises:
      ValueError: a missing or truncated shard, a missing or unexpected tensor, a wrong shape or
        dtype, a config that is not supported. The message names file, key and remedy. Or a
        parameter that the devices cannot share evenly.
    """
    folder = Path(path)
    if weights not in (None, "int8"):
        raise ValueError(f"weights is {weights!r}; it must be 'int8', or None for those stored")
    wanted = None if dtype is None else _float_dtype(dtype)
    if is_run(folder) and weights is None and partition is None:
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
        held = np.dtype(np.float32) if spec.fp32 else wanted or stored_dtype(source, group)
        in_int8 = weights == "int8" and spec.inputs
        leaf = Leaf(name, spec, None if in_int8 else held, source, group)
        leaves[name] = read_leaf(leaf, partition)
    return source.config, _nest(leaves)


def _float_dtype(dtype: Any) -> np.dtype:
    resolved = jnp.dtype(dtype)
    if resolved not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"dtype is {resolved}; it must be float32 or bfloat16")
    return resolved


def _nest(leaves: dict[str, jax.Array | Int8]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
