"""Losses, in fp32, of logits and router statistics; and `mmx.loss`, which puts them together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmx.config import ModelConfig
from mmx.model import Params, Remat, backbone, check_tokens, head_name, param_specs, unembed
from mmx.nn.block import LayerStats, gradients_at_once
from mmx.nn.moe import RouterStats
from pallas_kernels.dispatch import concrete
from sharding import Partition, constrain, vocabulary

IGNORED_LABEL = -100
BalanceLoss = Literal["checkpoint", "paper"]
# Logits of one block: large enough for full matrix products, small beside the parameters. Blocks
# are never shorter than this many tokens a row, so that many rows do not make tiny products.
_BLOCK_BYTES = 1 << 29
_BLOCK_TOKENS = 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossParts:
    """What `loss_parts` knows beside the total.

    Attributes:
      cross_entropy, z_loss: means over the targets, without coefficients.
      balance_loss: without its coefficient.
      num_targets: positions that count.
      token_losses: -log softmax(logits)[target] where a position counts, 0 elsewhere.
      counted: positions that count.
      stats: of every layer.
    """

    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    num_targets: Float[Array, ""]
    token_losses: Float[Array, "B T"]
    counted: Bool[Array, "B T"]
    stats: LayerStats


def cross_entropy(
    logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean over the counted positions of -log softmax(logits)[target]; 0 when none is counted."""
    wide, targets = logits.astype(jnp.float32), jnp.where(counted, targets, 0)
    return _mean(vocabulary.losses_of(wide, targets)[0], counted)


def z_loss(logits: Float[Array, "B T vocab"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the counted positions of logsumexp(logits)^2, which keeps logits from drifting."""
    return _mean(jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)), counted)


def checkpoint_balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """E sum_e f_e P_e with f and P pooled over all layers (the released and transformers' code).

    f_e is the share of tokens that chose expert e (summing to k), P_e the mean probability; padding
    counts in neither. Perfect balance gives k.
    """
    tokens = jnp.maximum(jnp.sum(stats.num_tokens), 1)
    chosen = jnp.sum(stats.tokens_per_expert, axis=0) / tokens
    probability = jnp.sum(stats.probability_sum, axis=0) / tokens
    return chosen.shape[0] * jnp.sum(chosen * probability)


def paper_balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """1/E sum_e f_e m_e of each layer, summed over the layers (paper, section 2.1).

    The paper multiplies by 0.01. Smaller than the checkpoint's form by E^2, so coefficients are not
    interchangeable.
    """
    tokens = jnp.maximum(stats.num_tokens, 1)[:, None]
    products = (stats.tokens_per_expert / tokens) * (stats.probability_sum / tokens)
    return jnp.sum(products) / products.shape[1]


def next_token_targets(
    batch: Mapping[str, Array], *, partition: Partition | None = None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What each position should predict, and whether it counts.

    Position t predicts `labels[:, t + 1]` (the tokens themselves when there are no labels). It does
    not count where that label is -100, where either token is padding, across a border between
    packed samples, or at the last position.
    """
    # Neighbours may lie on other devices: each has whole rows for this.
    batch = {
        name: constrain(array, "batch", None, partition=partition) for name, array in batch.items()
    }
    labels = batch.get("labels", batch["tokens"])
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counted = targets != IGNORED_LABEL
    for key in ("mask", "segment_ids"):
        ids = batch.get(key)
        if ids is not None:
            following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
            counted &= (ids == following) & (ids != 0)
    targets, counted = (
        constrain(array, "batch", "seq", partition=partition) for array in (targets, counted)
    )
    return targets, counted


def loss(
    params: Params,
    batch: Mapping[str, Array],
    config: ModelConfig,
    *,
    balance_loss: BalanceLoss = "checkpoint",
    balance_coef: float | None = None,
    z_loss_coef: float = 0.0,
    remat: Remat = "none",
    implementation: str | None = None,
    capacity_factor: float | None = None,
    loss_blocks: int | None = None,
    partition: Partition | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Next-token loss of a batch: cross entropy + balance loss + z-loss, each with its coefficient.

    Made for `jax.value_and_grad(mmx.loss, has_aux=True)`.

    Args:
      batch: 'tokens' [B, T] and, as needed, 'labels' (same positions as tokens, -100 ignored),
        'mask' (1 = token) and 'segment_ids' (packed samples), all [B, T].
      balance_loss: 'checkpoint' or 'paper', see the functions of this module.
      balance_coef: its coefficient; `config.router_aux_loss_coef` when None.
      z_loss_coef: coefficient of the z-loss.
      remat, implementation, partition: as for `mmx.forward`.
      capacity_factor: room of each expert, 1 being perfect balance; None drops nothing
        (`sharding.capacity.within_capacity`).
      loss_blocks: cut the sequence into so many blocks of which only one has logits at a time; None
        chooses by the size of the logits. Changes memory, not results.

    Returns:
      The total, and a dict of 'cross_entropy', 'balance_loss', 'z_loss' (without coefficients) and
      'num_targets'.

    Raises:
      ValueError: a batch without tokens, arrays of the wrong shape or dtype, an unknown loss.
    """
    total, parts = loss_parts(
        params,
        batch,
        config,
        balance_loss=balance_loss,
        balance_coef=balance_coef,
        z_loss_coef=z_loss_coef,
        remat=remat,
        implementation=implementation,
        capacity_factor=capacity_factor,
        loss_blocks=loss_blocks,
        statistics=False,
        partition=partition,
    )
    names = ("cross_entropy", "balance_loss", "z_loss", "num_targets")
    return total, {name: getattr(parts, name) for name in names}


def loss_parts(
    params: Params,
    batch: Mapping[str, Array],
    config: ModelConfig,
    *,
    balance_loss: BalanceLoss = "checkpoint",
    balance_coef: float | None = None,
    z_loss_coef: float = 0.0,
    remat: Remat = "none",
    implementation: str | None = None,
    capacity_factor: float | None = None,
    loss_blocks: int | None = None,
    statistics: bool = True,
    partition: Partition | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """`loss` with everything it knows: losses of single tokens and statistics of the layers."""
    forms = {"checkpoint": checkpoint_balance_loss, "paper": paper_balance_loss}
    if balance_loss not in forms:
        raise ValueError(f"balance_loss is {balance_loss!r}; it must be 'checkpoint' or 'paper'")
    check_batch(batch, config)
    x, _, _, stats = backbone(
        params,
        batch["tokens"],
        config,
        mask=batch.get("mask"),
        segment_ids=batch.get("segment_ids"),
        remat=remat,
        implementation=implementation,
        capacity_factor=capacity_factor,
        statistics=statistics,
        partition=partition,
    )
    targets, counted = next_token_targets(batch, partition=partition)
    token_losses, log_totals = blockwise_token_losses(
        params, x, targets, counted, config, blocks=loss_blocks, partition=partition
    )
    parts = LossParts(
        cross_entropy=_mean(token_losses, counted),
        z_loss=_mean(jnp.square(log_totals), counted),
        balance_loss=forms[balance_loss](stats),
        num_targets=jnp.sum(counted).astype(jnp.float32),
        token_losses=jnp.where(counted, token_losses, 0),
        counted=counted,
        stats=stats,
    )
    coefficient = config.router_aux_loss_coef if balance_coef is None else balance_coef
    return (
        parts.cross_entropy + coefficient * parts.balance_loss + z_loss_coef * parts.z_loss,
        parts,
    )


def check_batch(batch: Mapping[str, Array], config: ModelConfig) -> None:
    """Raise ValueError for a batch that `loss` cannot take."""
    unknown = set(batch) - {"tokens", "labels", "mask", "segment_ids"}
    if "tokens" not in batch or unknown:
        raise ValueError(
            f"batch has the keys {sorted(batch)}; it must have 'tokens' and may have 'labels', "
            "'mask', 'segment_ids'"
        )
    tokens = batch["tokens"]
    check_tokens(tokens, config, mask=batch.get("mask"), segment_ids=batch.get("segment_ids"))
    if "labels" not in batch:
        return
    if batch["labels"].shape != tokens.shape:
        raise ValueError(f"labels have shape {batch['labels'].shape}; tokens have {tokens.shape}")
    labels = concrete(batch["labels"])
    if labels is not None:
        wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= config.vocab_size))
        if wrong.any():
            raise ValueError(
                f"labels contain {labels[wrong][0]}; they must be ids in [0, vocab_size="
                f"{config.vocab_size}), or {IGNORED_LABEL} where none counts"
            )


def blockwise_token_losses(
    params: Params,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    config: ModelConfig,
    *,
    blocks: int | None = None,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """-log softmax(logits)[target] and logsumexp(logits) of each token, one block at a time.

    The backward pass computes the logits of a block again, so that fp32 logits are never there for
    more than one: at 200k words those of 8K tokens are 6.5 GB. See `sharding.vocabulary`.

    Args:
      params: of the model; only the head is read (the embedding when the two are tied).
      x: activations after the final norm.
      targets, counted: from `next_token_targets`. Losses mean nothing where not counted.
      config: of the model.
      blocks: how many; None takes as few as keep a block's logits below half a gigabyte a device.
      partition: of tokens and vocabulary; None for one device.

    Raises:
      ValueError: blocks below 1, or sizes that the devices cannot share evenly.
    """
    batch, length = targets.shape
    if blocks is None:
        logit_bytes = 4 * batch * length * config.vocab_size
        if partition is not None:
            logit_bytes //= partition.devices_of("batch", "seq", "vocab")
            length //= partition.devices_of("seq")
        blocks = min(math.ceil(logit_bytes / _BLOCK_BYTES), math.ceil(length / _BLOCK_TOKENS))
    if blocks < 1:
        raise ValueError(f"loss_blocks is {blocks}; it must be at least 1, or None")
    name = head_name(config)
    head = params[name]
    if partition is not None and partition.mesh.size > 1:
        x, head = gradients_at_once(x, head)
    return vocabulary.token_losses(
        x,
        head,
        jnp.where(counted, targets, 0),
        logits=lambda head, x: unembed({name: head}, x, config),
        head_axes=jax.tree.map(lambda spec: spec.axes, param_specs(config)[name]),
        vocab_size=config.vocab_size,
        blocks=blocks,
        partition=partition,
    )


def _mean(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    number = jnp.maximum(jnp.sum(counted), 1)
    return jnp.sum(jnp.where(counted, values, 0)) / number
