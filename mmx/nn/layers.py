"""How a module declares a parameter, and the two smallest modules.

Modules hold `jax.ShapeDtypeStruct`s when they are built and arrays when `bind` has filled them in;
they never hold random numbers, caches or counters, and `__call__` never assigns to `self`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx.nn import functional
from sharding import Partition, constrain, vocabulary


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: everything that initialisation, sharding and conversion need to know.

    Attributes:
      shape: its shape.
      axes: the logical axis of each dimension ('embed', 'heads', ...; None is never sharded).
      std: standard deviation at initialisation; 0 means ones (norm scales).
      fp32: kept in fp32 whatever the dtype of the model (router).
      inputs: the axes that a product sums over, of a matrix that may be held in int8
        (`quantized.Int8`); none where it may not.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float
    fp32: bool = False
    inputs: tuple[int, ...] = ()

    def abstract(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """Shape and dtype in a model of this dtype."""
        return jax.ShapeDtypeStruct(self.shape, jnp.float32 if self.fp32 else dtype)


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int = 0,
    fan_out: int = 0,
    fp32: bool = False,
    inputs: tuple[int, ...] = (),
) -> nnx.Param:
    """Declare a parameter: Xavier normal from its fans, ones when it has none."""
    std = (2.0 / (fan_in + fan_out)) ** 0.5 if fan_in + fan_out else 0.0
    spec = ParamSpec(shape, axes, std, fp32, inputs)
    return nnx.Param(spec.abstract(jnp.float32), spec=spec)


def specs(module: nnx.Module) -> dict[str, Any]:
    """The parameters a module declares, as a nested dict of ParamSpec."""
    state = nnx.state(module, nnx.Param)
    tree: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(state):
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf.get_metadata()["spec"]
    return tree


def bind[M: nnx.Module](module: M, params: Mapping[str, Any]) -> M:
    """The module with these arrays in place of its declarations; the module itself is untouched."""
    return nnx.merge(nnx.graphdef(module), params)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, dim: int, axis: str, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = declare((dim,), (axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return functional.rms_norm(x, self.scale[...], epsilon=self.epsilon)


class Embedding(nnx.Module):
    """Token embedding, also the head when the two are tied."""

    def __init__(self, vocab_size: int, dim: int):
        self.embedding = declare((vocab_size, dim), ("vocab", "embed"), fan_in=dim, fan_out=dim)

    def __call__(
        self, tokens: Int[Array, "B T"], *, partition: Partition | None = None
    ) -> Float[Array, "B T D"]:
        """Rows of the embedding; NaN for an id out of range."""
        return vocabulary.lookup(self.embedding[...], tokens, partition=partition)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """fp32 logits against the embedding (tied head)."""
        return functional.project("btd,vd->btv", x, self.embedding[...], out_dtype=jnp.float32)


class Head(nnx.Module):
    """The language-model head: fp32 logits from activations of any dtype."""

    def __init__(self, dim: int, vocab_size: int):
        self.kernel = declare((dim, vocab_size), ("embed", "vocab"), fan_in=dim, fan_out=vocab_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        return functional.project("btd,dv->btv", x, self.kernel[...], out_dtype=jnp.float32)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x): the shared expert."""

    def __init__(self, dim: int, hidden: int):
        shape, axes = (dim, hidden), ("embed", "mlp")
        self.gate_proj = declare(shape, axes, fan_in=dim, fan_out=hidden, inputs=(0,))
        self.up_proj = declare(shape, axes, fan_in=dim, fan_out=hidden, inputs=(0,))
        shape, axes = (hidden, dim), ("mlp", "embed")
        self.down_proj = declare(shape, axes, fan_in=hidden, fan_out=dim, inputs=(0,))

    def __call__(
        self, x: Float[Array, "B T D"], *, partition: Partition | None = None
    ) -> Float[Array, "B T D"]:
        gate, up = (
            constrain(
                functional.project("btd,df->btf", x, kernel[...]),
                "batch", "seq", "mlp", partition=partition,
            )
            for kernel in (self.gate_proj, self.up_proj)
        )  # fmt: skip
        return functional.project("btf,fd->btd", functional.swiglu(gate, up), self.down_proj[...])
