"""Mixture of experts: fp32 router, top-k, every token to its experts, none dropped."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mmx.config import ModelConfig
from mmx.nn import functional
from mmx.nn.layers import GatedMLP, declare
from pallas_kernels import grouped_matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """What the balance losses need of a router, padding excluded; one row a layer once stacked.

    Attributes:
      tokens_per_expert: choices each expert received, summing to num_tokens * k.
      probability_sum: sum over the tokens of the router's probabilities.
      num_tokens: tokens that are not padding.
      logits: the router's logits, when asked for.
    """

    tokens_per_expert: Float[Array, "*layers E"]
    probability_sum: Float[Array, "*layers E"]
    num_tokens: Float[Array, "*layers"]
    logits: Float[Array, "*layers B T E"] | None


class Router(nnx.Module):
    """softmax(x W) over the experts in fp32, the k largest, renormalised to sum to 1."""

    def __init__(self, config: ModelConfig):
        self.num_experts_per_tok = config.num_experts_per_tok
        shape = (config.embed_dim, config.num_experts)
        axes = ("embed", None)  # never split: each device needs every logit
        self.kernel = declare(shape, axes, fan_in=shape[0], fan_out=shape[1], fp32=True)

    def __call__(self, x: Float[Array, "N D"]):
        """Return weights [N, k] fp32, expert indices [N, k], probabilities and logits [N, E]."""
        logits = functional.project("nd,de->ne", x.astype(jnp.float32), self.kernel[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.num_experts_per_tok)
        return weights / jnp.sum(weights, -1, keepdims=True), experts, probabilities, logits


class MoE(nnx.Module):
    """sum_k weight_k down_k(silu(gate_k x) * up_k x), optionally mixed with a shared expert."""

    def __init__(self, config: ModelConfig):
        experts, dim, hidden = config.num_experts, config.embed_dim, config.expert_dim
        self.router = Router(config)
        axes = ("experts", "embed", "expert_mlp")
        self.gate_proj = declare((experts, dim, hidden), axes, fan_in=dim, fan_out=hidden)
        self.up_proj = declare((experts, dim, hidden), axes, fan_in=dim, fan_out=hidden)
        axes = ("experts", "expert_mlp", "embed")
        self.down_proj = declare((experts, hidden, dim), axes, fan_in=hidden, fan_out=dim)
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
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            weights, experts, probabilities, logits = self.router(tokens)
        with jax.named_scope("experts"):
            out = self._experts(tokens, weights, experts, implementation)
        if self.has_shared_expert:
            with jax.named_scope("shared_expert"):
                wide = tokens.astype(jnp.float32)
                mix = jax.nn.sigmoid(
                    functional.project("nd,dc->nc", wide, self.shared_coefficient[...])
                )
                out = out * (1 - mix) + self.shared_expert(tokens).astype(jnp.float32) * mix

        counted = real.reshape(-1, 1).astype(jnp.float32)
        num_experts = probabilities.shape[1]
        chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)
        stats = RouterStats(
            tokens_per_expert=jnp.sum(chosen * counted, axis=0),
            probability_sum=jnp.sum(probabilities * counted, axis=0),
            num_tokens=jnp.sum(counted),
            logits=logits.reshape(*x.shape[:2], num_experts) if keep_logits else None,
        )
        return out.reshape(x.shape).astype(x.dtype), stats

    def _experts(self, tokens, weights, experts, implementation) -> Float[Array, "N D"]:
        """Sort the tokens by expert, run three grouped products, add up in fp32."""
        per_token = experts.shape[1]
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        group_sizes = jnp.bincount(flat, length=self.router.kernel.shape[1])

        def product(rows, kernel):
            kernel = kernel[...].astype(rows.dtype)
            return grouped_matmul(rows, kernel, group_sizes, implementation=implementation)

        rows = tokens[order // per_token]
        hidden = functional.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj)
        rows = product(hidden, self.down_proj)
        unsorted = rows[jnp.argsort(order)].reshape(*experts.shape, -1)
        return jnp.sum(unsorted.astype(jnp.float32) * weights[..., None], axis=1)
