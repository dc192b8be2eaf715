"""Mixture of experts: fp32 router, top-k, every token to its experts.

No token is dropped unless training asks for a capacity: see `within_capacity`.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmx.config import ModelConfig
from mmx.nn import functional
from mmx.nn.layers import GatedMLP, declare
from pallas_kernels.dispatch import accumulation_dtype


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
        shape, axes = (experts, dim, hidden), ("experts", "embed", "expert_mlp")
        self.gate_proj = declare(shape, axes, fan_in=dim, fan_out=hidden, inputs=(1,))
        self.up_proj = declare(shape, axes, fan_in=dim, fan_out=hidden, inputs=(1,))
        shape, axes = (experts, hidden, dim), ("experts", "expert_mlp", "embed")
        self.down_proj = declare(shape, axes, fan_in=hidden, fan_out=dim, inputs=(1,))
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
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Mix the experts of each token.

        Args:
          x: activations.
          real: where there is a token and not padding.
          keep_logits: return the router's logits.
          implementation: of the grouped matmul.
          capacity_factor: what `within_capacity` drops; None drops nothing.
          statistics: also fill in `entropy_sum` and `num_dropped`.

        Returns:
          The output, of the dtype of `x`, and the router's statistics.
        """
        tokens, is_token = x.reshape(-1, x.shape[-1]), real.reshape(-1)
        with jax.named_scope("router"):
            weights, experts, probabilities, logits = self.router(tokens)
        num_experts = probabilities.shape[1]
        kept = None
        if capacity_factor is not None:
            kept = within_capacity(
                experts, is_token, num_experts=num_experts, capacity_factor=capacity_factor
            )
        with jax.named_scope("experts"):
            out = self._experts(tokens, weights, experts, kept, implementation)
        if self.has_shared_expert:
            with jax.named_scope("shared_expert"):
                wide = tokens.astype(jnp.float32)
                mix = jax.nn.sigmoid(
                    functional.project("nd,dc->nc", wide, self.shared_coefficient[...])
                )
                out = out * (1 - mix) + self.shared_expert(tokens).astype(jnp.float32) * mix

        counted = is_token[:, None].astype(jnp.float32)
        chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)
        stats = RouterStats(
            tokens_per_expert=jnp.sum(chosen * counted, axis=0),
            probability_sum=jnp.sum(probabilities * counted, axis=0),
            num_tokens=jnp.sum(counted),
            logits=logits.reshape(*x.shape[:2], num_experts) if keep_logits else None,
            entropy_sum=_entropy_sum(logits, is_token) if statistics else None,
            num_dropped=_num_dropped(kept, is_token) if statistics else None,
        )
        return out.reshape(x.shape).astype(x.dtype), stats

    def _experts(self, tokens, weights, experts, kept, implementation) -> Float[Array, "N D"]:
        """Sort the tokens by expert, run three grouped products, add up in fp32."""
        per_token, num_experts = experts.shape[1], self.router.kernel.shape[1]
        # A choice that is not kept goes past the last group, where the grouped matmul gives 0.
        flat = (experts if kept is None else jnp.where(kept, experts, num_experts)).reshape(-1)
        order = jnp.argsort(flat, stable=True)
        place = jnp.argsort(order)
        group_sizes = jnp.bincount(flat, length=num_experts + 1)[:num_experts]

        def product(rows, kernel):
            return functional.project_groups(
                rows, kernel[...], group_sizes, implementation=implementation
            )

        rows = _dispatch(per_token, tokens, order, place)
        hidden = functional.swiglu(product(rows, self.gate_proj), product(rows, self.up_proj))
        rows = product(hidden, self.down_proj)
        unsorted = _combine(rows, order, place).reshape(*experts.shape, -1)
        return _weighted_sum(unsorted, weights)


# Two gathers by a permutation that is known in both directions: `order[i]` is the choice in sorted
# row i, `place` its inverse. So their gradients are gathers as well, where autodiff would scatter
# and add up in bf16.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(
    per_token: int, tokens: Float[Array, "N D"], order: Int[Array, "M"], place: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """The token of each choice, sorted: row i is token `order[i] // per_token`."""
    return tokens[order // per_token]


def _dispatch_forward(per_token, tokens, order, place):
    return _dispatch(per_token, tokens, order, place), place


def _dispatch_backward(per_token, place, grad):
    choices = grad[place].reshape(-1, per_token, grad.shape[1])
    total = jnp.sum(choices, axis=1, dtype=accumulation_dtype(grad.dtype))
    return total.astype(grad.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(
    rows: Float[Array, "M D"], order: Int[Array, "M"], place: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """Sorted rows back in the order of the choices: row i is the one at `place[i]`."""
    return rows[place]


def _combine_forward(rows, order, place):
    return _combine(rows, order, place), order


def _combine_backward(order, grad):
    return grad[order], None, None


_combine.defvjp(_combine_forward, _combine_backward)


@functional.recomputed
def _weighted_sum(
    choices: Float[Array, "N k D"], weights: Float[Array, "N k"]
) -> Float[Array, "N D"]:
    return jnp.sum(choices.astype(jnp.float32) * weights[..., None], axis=1)


def within_capacity(
    experts: Int[Array, "N k"],
    is_token: Bool[Array, "N"],
    *,
    num_experts: int,
    capacity_factor: float,
) -> Bool[Array, "N k"]:
    """Which choices their expert has room for: the rest are dropped in training.

    An expert takes ceil(capacity_factor * k * tokens / E) choices, first choices before second ones
    and then in the order of the tokens (GShard). Counts are those of the whole micro-batch, however
    it is spread over devices, which is what the paper's global router achieves (section 2.1; it
    leaves factor and order open). Padding is never kept and takes no room. A dropped choice adds
    nothing, and the weights of a token's other choices stay as they are: a token that loses all of
    them goes on with its residual alone.

    Args:
      experts: chosen experts, best first.
      is_token: False for padding.
      num_experts: E.
      capacity_factor: 1 is room for perfect balance.
    """
    per_token = experts.shape[1]
    flat = jnp.where(is_token[:, None], experts, num_experts).T.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts + 1)
    begins = jnp.cumsum(sizes) - sizes
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size) - begins[flat[order]])
    room = capacity_factor * per_token / num_experts * jnp.sum(is_token)
    # Less a hair, so that rounding in fp32 does not make a whole number of places one more.
    room = jnp.ceil(room * (1 - 1e-6)).astype(jnp.int32)
    return ((place < room) & (flat < num_experts)).reshape(per_token, -1).T


def _entropy_sum(logits: Float[Array, "N E"], is_token: Bool[Array, "N"]) -> Float[Array, ""]:
    logits = jax.lax.stop_gradient(logits)
    mean_logit = jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)
    return jnp.sum(jnp.where(is_token, jax.nn.logsumexp(logits, axis=-1) - mean_logit, 0))


def _num_dropped(kept: Bool[Array, "N k"] | None, is_token: Bool[Array, "N"]) -> Float[Array, ""]:
    if kept is None:
        return jnp.zeros((), jnp.float32)
    return jnp.sum(is_token[:, None] & ~kept).astype(jnp.float32)
