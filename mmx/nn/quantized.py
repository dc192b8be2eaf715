"""A matrix in int8 for inference: half the bytes of bf16.

Every output channel has a scale of its own, which multiplies its sum once, so int8 is all that a
product reads of the matrix:

    w[i, o] ~ values[i, o] scale[o]        x w ~ (x values) scale
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

LARGEST = 127  # -128 is not used: the range is symmetric


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Stands where a parameter's array would; the layers know it (`functional.project`).

    Attributes:
      values: int8, of the parameter's shape. Exact in bf16, so a cast to activations is, too.
      scale: fp32, of the same shape with the axes that a product sums over of size 1.
    """

    values: Int[Any, "..."]
    scale: Float[Any, "..."]

    def __getitem__(self, index: Any) -> "Int8":
        """Both parts at an index of leading axes that no product sums over, or at `...`."""
        return Int8(self.values[index], self.scale[index])


def quantized(w: Float[Array | np.ndarray, "..."], inputs: tuple[int, ...]) -> Int8:
    """The nearest int8 matrix: scale = max |w| / 127 over the inputs, values = round(w / scale).

    Each weight is off by at most half a scale. A channel of zeros has the scale 0, as has one so
    small (below 1.5e-36) that its scale is not a normal number; a NaN makes its channel NaN. The
    same in numpy as in jax.

    Args:
      w: of any floating dtype; computed in fp32.
      inputs: the axes that a product sums over.
    """
    xp = w.__array_namespace__()
    wide = w.astype(np.float32)
    least, most = (f(wide, axis=inputs, keepdims=True) for f in (xp.min, xp.max))
    # Multiplied by the inverse, as XLA makes of a quotient: numpy would differ in the last bit.
    scale = xp.maximum(-least, most) * np.float32(1 / LARGEST)
    scale = xp.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
    inverse = xp.where(scale == 0, np.float32(0), 1 / xp.where(scale == 0, np.float32(1), scale))
    return Int8(xp.round(wide * inverse).astype(np.int8), scale)


def axes_of(w: Any, axes: tuple[str | None, ...]) -> Any:
    """The logical axes of a parameter, or of both parts of one in int8."""
    if not isinstance(w, Int8):
        return axes
    sizes = zip(axes, w.scale.shape, strict=True)
    return Int8(axes, tuple(None if size == 1 else axis for axis, size in sizes))


def is_quantized(params: Any) -> bool:
    """Whether any leaf of a tree is held in int8."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    return any(isinstance(leaf, Int8) for leaf in leaves)
