"""Parameters with their large matrices in int8: those of attention and experts.

Router, norms, embedding and head stay as they are. `mmx.load(path, weights="int8")` gives the same
without the model ever being there in another dtype.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mmx.config import ModelConfig
from mmx.model import Params, abstract_params, param_specs
from mmx.nn.layers import ParamSpec
from mmx.nn.quantized import Int8, quantized

Weights = Literal["bf16", "int8"]
_quantized = jax.jit(quantized, static_argnums=1)


def quantize(params: Params, config: ModelConfig) -> Params:
    """The parameters with each matrix that may be held in int8 as `Int8`, the rest untouched.

    Leaf by leaf, where the leaves are: the values are sharded as they were.
    """

    def leaf(spec: ParamSpec, w: jax.Array) -> jax.Array | Int8:
        return _quantized(w, spec.inputs) if spec.inputs else w

    return jax.tree.map(leaf, param_specs(config), params)


def param_bytes(config: ModelConfig, *, weights: Weights) -> dict[str, int]:
    """Bytes of parameters by kind, from shapes alone.

    Args:
      config: of the model.
      weights: 'bf16', or 'int8' where they may be; routers are fp32, what remains is bf16.

    Returns:
      'attention' and 'experts' (matrices, a shared expert's too), 'scales' (of those in int8) and
      'rest'.

    Raises:
      ValueError: other weights.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}; it must be 'bf16' or 'int8'")
    params = abstract_params(config, dtype=jnp.dtype(jnp.bfloat16))
    if weights == "int8":
        params = jax.eval_shape(lambda params: quantize(params, config), params)
    found: dict[str, int] = dict.fromkeys(("attention", "experts", "scales", "rest"), 0)
    specs = jax.tree_util.tree_leaves_with_path(param_specs(config))
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    for (path, spec), leaf in zip(specs, leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = ("experts" if "/moe/" in name else "attention") if spec.inputs else "rest"
        if isinstance(leaf, Int8):
            found["scales"] += _bytes(leaf.scale)
            leaf = leaf.values
        found[kind] += _bytes(leaf)
    return found


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize
