"""What training takes of a device's memory: estimates before compiling, the compiler's number."""

import functools
import math
from typing import Any

import jax

import mmx
from mmx.config import ModelConfig
from mmx.model import Params, Remat
from mmx.training.state import abstract_state
from mmx.training.step import StepOptions, compute_params

GIGA = 1e9


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def device_limit() -> float:
    """Bytes that arrays may take; infinite where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def saved_bytes(config: ModelConfig, params: Params, batch: dict, remat: Remat) -> int:
    """Bytes the forward pass keeps for the backward pass, parameters not counted."""

    def pull(params, batch):
        return jax.vjp(lambda p: mmx.loss(p, batch, config, remat=remat)[0], params)[1]

    kept = num_bytes(jax.eval_shape(pull, params, batch))
    return max(0, kept - num_bytes(params))


def estimate(config: ModelConfig, params: Params, batch: dict, remat: Remat) -> dict[str, float]:
    """GB: parameters in bf16, gradients in bf16, activations at their largest moment.

    With 'layer' and 'superblock' the largest moment is when one of them has been computed again.
    """
    saved = saved_bytes(config, params, batch, remat)
    parts = {"none": math.inf, "superblock": config.num_superblocks, "layer": config.num_layers}
    whole = saved if remat == "none" else saved_bytes(config, params, batch, "none")
    row = {
        "params_GB": num_bytes(params),
        "grads_GB": num_bytes(params),
        "saved_GB": saved,
        "again_GB": whole / parts[remat],
    }
    return {name: value / GIGA for name, value in row.items()}


def estimate_step(config: ModelConfig, batch: dict, options: StepOptions) -> dict[str, float]:
    """`estimate` of a whole step: master and moments beside it, fp32 gradients after it."""
    state = abstract_state(config, options.optimizer)
    cast_params = functools.partial(compute_params, config=config, dtype="bfloat16")
    row = estimate(config, jax.eval_shape(cast_params, state.params), batch, options.remat)
    state_size, wide = num_bytes(state) / GIGA, num_bytes(state.params) / GIGA
    activations = row["saved_GB"] + row["again_GB"]
    fixed = state_size + row["params_GB"] + row["grads_GB"]
    return {"state_GB": state_size, **row, "sum_GB": fixed + max(activations, wide)}


def compiled_GB(compiled: Any) -> float:
    """What the compiler says a program needs, arguments included; 0 when it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return 0.0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return (held + found.temp_size_in_bytes) / GIGA
