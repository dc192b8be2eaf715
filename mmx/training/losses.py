"""Losses, in fp32, of logits and router statistics; and `mmx.loss`, which puts them together."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmx.config import ModelConfig
from mmx.model import Params, Remat, backbone, check_tokens, unembed
from mmx.nn.moe import RouterStats

IGNORED_LABEL = -100
BalanceLoss = Literal["checkpoint", "paper"]


def cross_entropy(
    logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean over the counted positions of -log softmax(logits)[target]; 0 when none is counted."""
    logits = logits.astype(jnp.float32)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    return _mean(log_total - chosen[..., 0], counted)


def z_loss(logits: Float[Array, "B T vocab"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the counted positions of logsumexp(logits)^2, which keeps logits from drifting."""
    return _mean(jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)), counted)


def checkpoint_balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """E sum_e f_e P_e with f and P pooled over all layers (the released and transformers' code).

    f_e is the share of tokens that chose expert e (summing to k), P_e the mean probability; padding
    counts in neither. Perfect balance gives k.
    """
    tokens = jnp.sum(stats.num_tokens)
    chosen = jnp.sum(stats.tokens_per_expert, axis=0) / tokens
    probability = jnp.sum(stats.probability_sum, axis=0) / tokens
    return chosen.shape[0] * jnp.sum(chosen * probability)


def paper_balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """1/E sum_e f_e m_e of each layer, summed over the layers (paper, section 2.1).

    The paper multiplies by 0.01. Smaller than the checkpoint's form by E^2, so coefficients are not
    interchangeable.
    """
    tokens = stats.num_tokens[:, None]
    products = (stats.tokens_per_expert / tokens) * (stats.probability_sum / tokens)
    return jnp.sum(products) / products.shape[1]


def next_token_targets(
    batch: Mapping[str, Array],
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What each position should predict, and whether it counts.

    Position t predicts `labels[:, t + 1]` (the tokens themselves when there are no labels). It does
    not count where that label is -100, where either token is padding, across a border between
    packed samples, or at the last position.
    """
    tokens = batch["tokens"]
    labels = batch.get("labels", tokens)
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    counted = targets != IGNORED_LABEL
    for key in ("mask", "segment_ids"):
        ids = batch.get(key)
        if ids is not None:
            following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
            counted &= (ids == following) & (ids != 0)
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
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Next-token loss of a batch: cross entropy + balance loss + z-loss, each with its coefficient.

    Made for `jax.value_and_grad(mmx.loss, has_aux=True)`.

    Args:
      batch: 'tokens' [B, T] and, as needed, 'labels' (same positions as tokens, -100 ignored),
        'mask' (1 = token) and 'segment_ids' (packed samples), all [B, T].
      balance_loss: 'checkpoint' or 'paper', see the functions of this module.
      balance_coef: its coefficient; `config.router_aux_loss_coef` when None.
      z_loss_coef: coefficient of the z-loss.
      remat, implementation: as for `mmx.forward`.

    Returns:
      The total, and a dict of 'cross_entropy', 'balance_loss', 'z_loss' (without coefficients) and
      'num_targets'.

    Raises:
      ValueError: a batch without tokens, arrays of the wrong shape or dtype, an unknown loss.
    """
    forms = {"checkpoint": checkpoint_balance_loss, "paper": paper_balance_loss}
    if balance_loss not in forms:
        raise ValueError(f"balance_loss is {balance_loss!r}; it must be 'checkpoint' or 'paper'")
    unknown = set(batch) - {"tokens", "labels", "mask", "segment_ids"}
    if "tokens" not in batch or unknown:
        raise ValueError(
            f"batch has the keys {sorted(batch)}; it must have 'tokens' and may have 'labels', "
            "'mask', 'segment_ids'"
        )
    tokens, mask, segment_ids = batch["tokens"], batch.get("mask"), batch.get("segment_ids")
    check_tokens(tokens, config, mask=mask, segment_ids=segment_ids)
    if "labels" in batch and batch["labels"].shape != tokens.shape:
        raise ValueError(f"labels have shape {batch['labels'].shape}; tokens have {tokens.shape}")
    x, _, _, stats = backbone(
        params,
        tokens,
        config,
        mask=mask,
        segment_ids=segment_ids,
        remat=remat,
        implementation=implementation,
    )
    logits = unembed(params, x, config)
    targets, counted = next_token_targets(batch)
    parts = {
        "cross_entropy": cross_entropy(logits, targets, counted),
        "balance_loss": forms[balance_loss](stats),
        "z_loss": z_loss(logits, counted),
        "num_targets": jnp.sum(counted).astype(jnp.float32),
    }
    coefficient = config.router_aux_loss_coef if balance_coef is None else balance_coef
    total = (
        parts["cross_entropy"] + coefficient * parts["balance_loss"] + z_loss_coef * parts["z_loss"]
    )
    return total, parts


def _mean(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    number = jnp.maximum(jnp.sum(counted), 1)
    return jnp.sum(jnp.where(counted, values, 0)) / number
