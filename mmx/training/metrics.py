"""What a step reports: sums over micro-batches on the device, numbers on the host."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmx.config import ModelConfig
from mmx.training.losses import LossParts

Metrics = dict[str, Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Numbers of one micro-batch that add up over the micro-batches of a step; fp32.

    Attributes:
      loss, cross_entropy, balance_loss, z_loss: times the micro-batch's share of the targets.
      loss_by_source, tokens_by_source: summed losses and number of targets of each source.
      tokens_per_expert, entropy, num_dropped: see `RouterStats`.
      num_tokens: not padding.
      state_mean_square: see `LayerStats`; of the lightning layers, in order.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    loss_by_source: Float[Array, "sources"]
    tokens_by_source: Float[Array, "sources"]
    tokens_per_expert: Float[Array, "layers E"]
    entropy: Float[Array, "layers"]
    num_dropped: Float[Array, "layers"]
    num_tokens: Float[Array, ""]
    state_mean_square: Float[Array, "lightning_layers"]


def micro_batch_sums(
    loss: Float[Array, ""],
    parts: LossParts,
    sources: Int[Array, "B T"] | None,
    config: ModelConfig,
    *,
    share: Float[Array, ""],
    num_sources: int,
) -> Sums:
    """The sums of one micro-batch that has this share of the step's targets.

    Args:
      loss: its total loss, a mean over its targets.
      parts: the rest of what `loss_parts` returns, with statistics.
      sources: source of each token; ids outside [0, num_sources) belong to none. Without sources
        all tokens belong to source 0.
      config: of the model.
      share: its targets / targets of the step.
      num_sources: static.
    """
    stats = parts.stats
    assert stats.entropy_sum is not None
    assert stats.num_dropped is not None
    assert stats.state_mean_square is not None
    if sources is None:
        sources = jnp.zeros(parts.counted.shape, jnp.int32)
    # One sum a source rather than a scatter: exact order, and no atomics on GPU.
    of_source = (sources == jnp.arange(num_sources)[:, None, None]) & parts.counted
    lightning = [i for i, kind in enumerate(config.layer_kinds) if kind == "lightning"]
    return Sums(
        loss=share * loss,
        cross_entropy=share * parts.cross_entropy,
        balance_loss=share * parts.balance_loss,
        z_loss=share * parts.z_loss,
        loss_by_source=jnp.sum(jnp.where(of_source, parts.token_losses, 0), axis=(1, 2)),
        tokens_by_source=jnp.sum(of_source, axis=(1, 2), dtype=jnp.float32),
        tokens_per_expert=stats.tokens_per_expert,
        entropy=stats.entropy_sum,
        num_dropped=stats.num_dropped,
        num_tokens=stats.num_tokens[0],
        state_mean_square=stats.state_mean_square[jnp.asarray(lightning, jnp.int32)],
    )


def from_sums(
    sums: Sums, config: ModelConfig, *, num_micro_batches: Float[Array, ""] | int
) -> Metrics:
    """The metrics that follow from the sums of a step; names and meaning in `make_train_step`."""
    tokens = jnp.maximum(sums.num_tokens, 1)
    choices = tokens * config.num_experts_per_tok
    return {
        "loss": sums.loss,
        "cross_entropy": sums.cross_entropy,
        "balance_loss": sums.balance_loss,
        "z_loss": sums.z_loss,
        "num_tokens": sums.num_tokens,
        "loss_by_source": sums.loss_by_source,
        "tokens_by_source": sums.tokens_by_source,
        "router_entropy": sums.entropy / tokens,
        "router_load": jnp.max(sums.tokens_per_expert, axis=1) * config.num_experts / choices,
        "dropped_tokens": sums.num_dropped / choices,
        "lightning_state_norm": jnp.sqrt(sums.state_mean_square / num_micro_batches),
    }


def to_record(metrics: Mapping[str, Array]) -> dict[str, float | list[float] | None]:
    """Metrics as plain numbers and lists, ready for `json`; waits for the device.

    What is not finite becomes None: JSON has no NaN, and readers refuse one.
    """

    def plain(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    record = {}
    for name, value in jax.device_get(dict(metrics)).items():
        array = np.asarray(value)
        record[name] = [plain(x) for x in array] if array.ndim else plain(array.item())
    return record
