"""Mixture of experts: fp32 router, top-k, every token to its experts.

No token is dropped unless training asks for a capacity: see `sharding.capacity`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

import sharding
from mmx.config import ModelConfig
from mmx.nn import functional, quantized
from mmx.nn.layers import GatedMLP, declare
from pallas_kernels import expert_mixture, expert_mixture_supported
from sharding import Partition

_AXES = {
    "gate_proj": ("experts", "embed", "expert_mlp"),
    "up_proj": ("experts", "embed", "expert_mlp"),
    "down_proj": ("experts", "expert_mlp", "embed"),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """What the balance losses need of a router, padding excluded; one row a layer once stacked.

    Attributes:
      tokens_per_expert: choices each expert received, summing to num_tokens * k; those it dropped
        for want of capacity count too.
      probability_sum: sum over the tokens of the router's probabilities.
      num_tokens: tokens that are not padding.
      logits: the router's logits, when asked for.
      entropy_sum: sum over the tokens of the entropy of the router's probabilities, in nats; with
        statistics.
      num_dropped: choices dropped for want of capacity; with statistics.
    """

    tokens_per_expert: Float[Array, "*layers E"]
    probability_sum: Float[Array, "*layers E"]
    num_tokens: Float[Array, "*layers"]
    logits: Float[Array, "*layers B T E"] | None
    entropy_sum: Float[Array, "*layers"] | None = None
    num_dropped: Float[Array, "*layers"] | None = None


class Router(nnx.Module):
    """softmax(x W) over the experts in fp32, the k largest, renormalised to sum to 1."""

    def __init__(self, config: ModelConfig):
        self.num_experts_per_tok = config.num_experts_per_tok
        shape = (config.embed_dim, config.num_experts)
        axes = ("embed", None)  # never split: each device needs every logit
        self.kernel = declare(shape, axes, fan_in=shape[0], fan_out=shape[1], fp32=True)

    def __call__(self, x: Float[Array, "B T D"], *, partition: Partition | None = None):
        """Return weights [B, T, k] fp32, experts [B, T, k], probabilities, logits [B, T, E]."""
        logits = functional.project("btd,de->bte", x.astype(jnp.float32), self.kernel[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        k = self.num_experts_per_tok
        weights, experts = sharding.experts.top_k(probabilities, k, partition=partition)
        return weights / jnp.sum(weights, -1, keepdims=True), experts, probabilities, logits


class MoE(nnx.Module):
    """sum_k weight_k down_k(silu(gate_k x) * up_k x), optionally mixed with a shared expert."""

    def __init__(self, config: ModelConfig):
        experts, dim, hidden = config.num_experts, config.embed_dim, config.expert_dim
        self.router = Router(config)
        for name, axes in _AXES.items():
            sizes = {"experts": experts, "embed": dim, "expert_mlp": hidden}
            shape = tuple(sizes[axis] for axis in axes)
            kernel = declare(shape, axes, fan_in=shape[1], fan_out=shape[2], inputs=(1,))
            setattr(self, name, kernel)
        self.has_shared_expert = config.shared_expert_dim > 0
        if self.has_shared_expert:
            self.shared_expert = GatedMLP(dim, config.shared_expert_dim)
            self.shared_coefficient = declare(
                (dim, 1), ("embed", None), fan_in=dim, fan_out=1, fp32=True
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        *,
        keep_logits: bool,
        implementation: str | None,
        capacity_factor: float | None = None,
        statistics: bool = False,
        recompute: bool = False,
        partition: Partition | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Mix the experts of each token.

        Args:
          x: activations.
          real: where there is a token and not padding.
          keep_logits: return the router's logits.
          implementation: of the grouped matmul.
          capacity_factor: see `sharding.capacity.within_capacity`; None drops nothing.
          statistics: also fill in `entropy_sum` and `num_dropped`.
          recompute: whether the layer is recomputed; see `sharding.experts.mixture`.
          partition: of tokens and experts; None for one device.

        Returns:
          The output, of the dtype of `x`, and the router's statistics.
        """
        with jax.named_scope("router"):
            weights, experts, probabilities, logits = self.router(x, partition=partition)
        with jax.named_scope("experts"):
            out, kept = None, None
            special = (implementation, capacity_factor, partition)
            if x.shape[1] == 1 and all(option is None for option in special):
                out = self._few_tokens(x[:, 0], probabilities[:, 0], real)
            if out is None:
                out, kept = self._experts(
                    x, weights, experts, real, implementation, capacity_factor, recompute, partition
                )
        if self.has_shared_expert:
            with jax.named_scope("shared_expert"):
                wide = x.astype(jnp.float32)
                mix = jax.nn.sigmoid(
                    functional.project("btd,dc->btc", wide, self.shared_coefficient[...])
                )
                shared = self.shared_expert(x, partition=partition)
                out = out * (1 - mix) + shared.astype(jnp.float32) * mix

        counted = real[..., None].astype(jnp.float32)
        chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32).sum(axis=2)
        stats = RouterStats(
            tokens_per_expert=jnp.sum(chosen * counted, axis=(0, 1)),
            probability_sum=jnp.sum(probabilities * counted, axis=(0, 1)),
            num_tokens=jnp.sum(counted),
            logits=logits if keep_logits else None,
            entropy_sum=_entropy_sum(logits, real) if statistics else None,
            num_dropped=_num_dropped(kept, real) if statistics else None,
        )
        return out.astype(x.dtype), stats

    def _few_tokens(self, x, probabilities, real) -> Float[Array, "B 1 D"] | None:
        """The same for a token a row, where a kernel needs them not sorted; None elsewhere."""
        kernels = [getattr(self, name)[...] for name in _AXES]
        matrices, scales = zip(*(functional.as_read(w, x.dtype) for w in kernels), strict=True)
        weights = mixing_weights(probabilities, self.router.num_experts_per_tok)
        arrays = x, jnp.where(real, weights, 0), *matrices
        if not expert_mixture_supported(*arrays):
            return None
        in_int8 = all(scale is not None for scale in scales)
        return expert_mixture(*arrays, scales=scales if in_int8 else None)[:, None]

    def _experts(
        self, x, weights, experts, real, implementation, capacity_factor, recompute, partition
    ):
        """Three grouped products over the tokens sorted by expert, added up in fp32."""

        def compute(params, rows, group_sizes):
            def product(rows, name):
                return functional.project_groups(
                    rows, params[name], group_sizes, implementation=implementation
                )

            hidden = functional.swiglu(product(rows, "gate_proj"), product(rows, "up_proj"))
            return product(hidden, "down_proj")

        params = {name: getattr(self, name)[...] for name in _AXES}
        return sharding.experts.mixture(
            x,
            weights,
            experts,
            real,
            params,
            param_axes={name: quantized.axes_of(params[name], _AXES[name]) for name in _AXES},
            compute=compute,
            num_experts=self.router.kernel.shape[1],
            partition=partition,
            capacity_factor=capacity_factor,
            recompute=recompute,
        )


def mixing_weights(probabilities: Float[Array, "N E"], k: int) -> Float[Array, "N E"]:
    """The weights of the k most probable experts, summing to 1, and 0 for the others.

    What `Router` chooses, first come first where two are alike, but by comparisons, which on a GPU
    are one kernel where a sort is several.
    """
    index = jnp.arange(probabilities.shape[1])
    mine, others = probabilities[:, :, None], probabilities[:, None, :]
    before = (others > mine) | ((others == mine) & (index < index[:, None]))
    chosen = jnp.where(jnp.sum(before, axis=2) < k, probabilities, 0)
    return chosen / jnp.sum(chosen, axis=1, keepdims=True)


def _entropy_sum(logits: Float[Array, "B T E"], real: Bool[Array, "B T"]) -> Float[Array, ""]:
    logits = jax.lax.stop_gradient(logits)
    mean_logit = jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)
    return jnp.sum(jnp.where(real, jax.nn.logsumexp(logits, axis=-1) - mean_logit, 0))


def _num_dropped(kept: Bool[Array, "B T k"] | None, real: Bool[Array, "B T"]) -> Float[Array, ""]:
    if kept is None:
        return jnp.zeros((), jnp.float32)
    return jnp.sum(real[..., None] & ~kept).astype(jnp.float32)
