"""The decay tables that transformers keeps beside the weights of a lightning layer.

Its class registers four buffers and reports those that a checkpoint lacks. With slope s of a head
and blocks of C tokens, i and j from 0, all fp32:

    slope_rate [H, 1, 1] = s                   query_decay [H, C, 1] = exp(-s (i + 1))
    key_decay [H, C, 1] = exp(-s (C - 1 - i))
    diagonal_decay [1, H, C, C] = exp(-s (i - j)) where i >= j, else 0
"""

import numpy as np

from mmx.config import ModelConfig, decay_slopes

NAMES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def key(layer: int, name: str) -> str:
    """The name of a table in a checkpoint."""
    return f"model.layers.{layer}.self_attn.{name}"


def shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape of a table."""
    heads, block = config.num_heads, config.chunk_size
    shapes = {"slope_rate": (heads, 1, 1), "diagonal_decay": (1, heads, block, block)}
    return shapes.get(name, (heads, block, 1))


def of_head(config: ModelConfig, layer: int, name: str, head: int) -> np.ndarray:
    """One head's part of a table, fp32; the parts of all heads in order are the table."""
    slope = decay_slopes(config)[layer, head]
    if name == "slope_rate":
        return slope.reshape(1)
    # Products in fp32, as there: 0.4 * 255 rounded once more would move exp by 6e-6.
    steps = np.arange(config.chunk_size, dtype=np.float32)
    if name == "query_decay":
        return np.exp(-slope * (steps + 1))
    if name == "key_decay":
        return np.exp(-slope * (config.chunk_size - 1 - steps))
    distance = steps[:, None] - steps[None, :]
    return np.where(distance >= 0, np.exp(-slope * np.maximum(distance, 0)), np.float32(0))
