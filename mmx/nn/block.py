"""One layer, and the superblock: the smallest run of layers that repeats."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx.config import LayerKind, ModelConfig
from mmx.nn.attention import SoftmaxAttention
from mmx.nn.layers import RMSNorm
from mmx.nn.lightning import LightningAttention
from mmx.nn.memory import Memory, State
from mmx.nn.moe import MoE, RouterStats
from mmx.nn.sequence import Sequence
from pallas_kernels.softmax_attention.reference import RESIDUALS
from sharding import Partition, constrain

# Kept where layers are recomputed: at a million tokens softmax attention is most of the time, and
# its output no more memory than a layer's input.
KEPT = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


@dataclass(frozen=True)
class Execution:
    """How to run layers: static options, none of which changes their result but `capacity_factor`.

    Attributes:
      keep_hidden: also return each layer's output and router logits.
      remat_layers: recompute each layer in the backward pass, all but `KEPT`.
      implementation: of the kernels; None lets the platform choose.
      capacity_factor: drop what experts have no room for (`sharding.capacity`); None drops nothing.
      statistics: also fill in the optional fields of `LayerStats`.
      partition: over which devices arrays are spread; None for one device.
    """

    keep_hidden: bool = False
    remat_layers: bool = False
    implementation: str | None = None
    capacity_factor: float | None = None
    statistics: bool = False
    partition: Partition | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStats(RouterStats):
    """What a layer reports of itself: `RouterStats`, and how large its lightning state has grown.

    Attributes:
      state_mean_square: mean square of the lightning state after the last token of each row, 0 for
        a softmax layer; with statistics.
    """

    state_mean_square: Float[Array, "*layers"] | None = None


class Layer(nnx.Module):
    """Attention and experts, each behind a norm and a weighted residual.

        a = norm(x);  y = alpha r + beta attention(a);  b = norm(y);  out = alpha r' + beta moe(b)

    The residual r, r' is the normalised a, b (post_norm, as released) or x, y themselves.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind):
        self.kind: LayerKind = kind
        self.post_norm = config.post_norm
        if kind == "lightning":
            self.alpha, self.beta = config.lightning_alpha, config.lightning_beta
            self.attention = LightningAttention(config)
        else:
            self.alpha, self.beta = config.softmax_alpha, config.softmax_beta
            self.attention = SoftmaxAttention(config)
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha, config.mlp_beta
        self.attention_norm = RMSNorm(config.embed_dim, "embed", epsilon=config.norm_epsilon)
        self.mlp_norm = RMSNorm(config.embed_dim, "embed", epsilon=config.norm_epsilon)
        self.moe = MoE(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        decay_slopes: Float[Array, "H"],
        memory: Any,
        execution: Execution,
    ) -> tuple[Float[Array, "B T D"], Any, LayerStats]:
        """Return the output, the layer's memory (state or slots) and its statistics."""
        normed = self.attention_norm(x)
        how = {"implementation": execution.implementation, "partition": execution.partition}
        with jax.named_scope(f"{self.kind}_attention"):
            if isinstance(self.attention, LightningAttention):
                branch, memory = self.attention(normed, sequence, decay_slopes, memory, **how)
            else:
                branch, memory = self.attention(normed, sequence, memory, **how)
        branch = spread(branch, execution.partition)
        x = _add(self.alpha, normed if self.post_norm else x, self.beta, branch)
        normed = self.mlp_norm(x)
        with jax.named_scope("moe"):
            branch, stats = self.moe(
                normed,
                sequence.real,
                keep_logits=execution.keep_hidden,
                capacity_factor=execution.capacity_factor,
                statistics=execution.statistics,
                recompute=execution.remat_layers,
                **how,
            )
        state_mean_square = None
        if execution.statistics:
            state = memory if self.kind == "lightning" else jnp.zeros(())
            state = state.value() if isinstance(state, State) else state
            state_mean_square = jnp.mean(jnp.square(jax.lax.stop_gradient(state)))
        x = _add(self.mlp_alpha, normed if self.post_norm else x, self.mlp_beta, branch)
        return (
            spread(x, execution.partition),
            memory,
            LayerStats(**vars(stats), state_mean_square=state_mean_square),
        )


def spread(x: Float[Array, "B T D"], partition: Partition | None) -> Float[Array, "B T D"]:
    """Activations where a partition has them between layers."""
    return constrain(x, "batch", "seq", "embed", partition=partition)


def _add(alpha: float, residual: jax.Array, beta: float, branch: jax.Array) -> jax.Array:
    total = alpha * residual.astype(jnp.float32) + beta * branch.astype(jnp.float32)
    return total.astype(residual.dtype)


class Superblock(nnx.Module):
    """The layers of one repetition, in order."""

    def __init__(self, config: ModelConfig):
        self.kinds = config.superblock
        for i, kind in enumerate(self.kinds):
            setattr(self, f"layer_{i}", Layer(config, kind))

    def __call__[M: Memory](
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        decay_slopes: Float[Array, "layers H"],
        memory: M | None,
        index: Int[Array, ""],
        execution: Execution,
    ) -> tuple[
        Float[Array, "B T D"],
        M | None,
        LayerStats,
        Float[Array, "layers B T D"] | None,
    ]:
        """Run superblock number `index` of the stack; see `Layer`."""
        stats, hidden = [], []
        for i, kind in enumerate(self.kinds):
            layer = getattr(self, f"layer_{i}")
            place = index * self.kinds.count(kind) + self.kinds[:i].count(kind)

            definition, params = nnx.split(layer)

            def run(x, params, layer_memory, definition=definition, i=i):
                layer = nnx.merge(definition, params)
                return layer(x, sequence, decay_slopes[i], layer_memory, execution)

            if execution.remat_layers:
                # With the barriers of prevent_cse: they also hold a layer's second forward pass
                # back until its backward pass is due, as several layers in one scan body need.
                run = jax.checkpoint(run, policy=KEPT)
                x, params = gradients_at_once(x, params)
            with jax.named_scope(f"layer_{i}"):
                seen = None if memory is None else memory.read(kind, place)
                x, seen, layer_stats = run(x, params, seen)
            if memory is not None:
                memory = memory.write(kind, place, seen)
            stats.append(layer_stats)
            hidden.append(x)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return x, memory, stacked, jnp.stack(hidden) if execution.keep_hidden else None


@jax.custom_vjp
def gradients_at_once(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """The arguments; their gradients are all computed before either is used.

    No other layer waits for a gradient of the weights, so a compiler may put all of them off to the
    end and keep what they are made of, three arrays of every layer as wide as its experts, or those
    of the head whole where devices split them.
    """
    return x, params


gradients_at_once.defvjp(
    lambda x, params: ((x, params), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)
