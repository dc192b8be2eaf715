"""Messages that no program names: those the compiler adds for weights and products that are split.

Known for sure only once compiled. Here they are what ZeRO-3 and split products ask for: a weight is
gathered where it is used, in each pass, and its gradient scattered; a product that sums over a
split dimension adds up its results. Experts, embedding and head name theirs themselves.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mmx.model import param_specs
from mmx.planning.programs import Program
from mmx.planning.walk import Collective


def messages(program: Program) -> list[Collective]:
    """What the compiler is expected to add, by kind and axes."""
    sums: dict[tuple[str, tuple[str, ...], str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind, axes, part, count, size in _each(program):
        if axes:
            entry = sums[kind, axes, part]
            entry[0] += count
            entry[1] += count * size
    return [Collective(*key, count, size) for key, (count, size) in sums.items()]


def _each(program: Program) -> Iterator[tuple[str, tuple[str, ...], str, float, float]]:
    ask, partition = program.request, program.partition
    training = ask.mode == "train"
    turns = ask.accumulation
    again = training and ask.remat != "none"
    passes = turns * (1 + training + again)
    width = 1 if ask.weights == "int8" else jnp.dtype(ask.dtype).itemsize
    length = 1 if ask.mode == "decode" else ask.seq
    rows = ask.batch * length / partition.devices_of("batch", "seq")
    activations = rows * ask.config.embed_dim * jnp.dtype(ask.dtype).itemsize
    for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(ask.config)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("blocks/") or "experts" in spec.axes:
            continue
        layers = spec.shape[0]
        kind = "lightning" if _is_lightning(ask.config.superblock, name) else "softmax"
        part = kind if "/attention/" in name else "dense"
        split = math.prod(partition.devices_of(axis) for axis in spec.axes[1:] if axis in _KEPT)
        size = math.prod(spec.shape[1:]) * (4 if spec.fp32 else width) / split
        over = partition.axes_of("embed") if "embed" in spec.axes else ()
        yield "all-gather", over, part, layers * passes, size
        if training:
            yield "reduce-scatter", over, part, layers * turns, size
        if name.endswith("out_proj"):
            heads = partition.axes_of("heads")
            yield "all-reduce", heads, part, layers * passes, activations


_KEPT = ("heads", "kv_heads", "mlp")


def _is_lightning(superblock: tuple[str, ...], name: str) -> bool:
    number = name.split("layer_")[1].split("/")[0]
    return superblock[int(number)] == "lightning"
