"""Losses in float64 numpy, counted out one position after the other. See truth.py."""

import numpy as np
from truth import softmax, wide


def predictions(tokens, *, labels=None, mask=None, segment_ids=None):
    """(row, position, target) of every position that has something to predict."""
    tokens = np.asarray(tokens)
    labels = tokens if labels is None else np.asarray(labels)
    found = []
    for row in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            padding = mask is not None and not (mask[row][t] and mask[row][t + 1])
            border = segment_ids is not None and (
                segment_ids[row][t] == 0 or segment_ids[row][t] != segment_ids[row][t + 1]
            )
            if labels[row, t + 1] != -100 and not padding and not border:
                found.append((row, t, int(labels[row, t + 1])))
    return found


def log_sum_exp(x):
    top = x.max()
    return top + np.log(np.exp(x - top).sum())


def cross_entropy(logits, where) -> float:
    logits = wide(logits)
    return float(np.mean([log_sum_exp(logits[b, t]) - logits[b, t, y] for b, t, y in where]))


def z_loss(logits, where) -> float:
    logits = wide(logits)
    return float(np.mean([log_sum_exp(logits[b, t]) ** 2 for b, t, _ in where]))


def balance_losses(router_logits, real, per_token) -> tuple[float, float]:
    """(checkpoint form, paper form) of router logits [L, B, T, E] at the tokens that are real."""
    layers = [np.asarray(logits)[np.asarray(real, bool)] for logits in router_logits]
    shares, means = [], []
    for logits in layers:
        experts = logits.shape[-1]
        chosen = np.zeros(experts)
        for row in logits:
            for expert in np.argsort(-row, kind="stable")[:per_token]:
                chosen[expert] += 1
        shares.append(chosen / len(logits))
        means.append(softmax(logits).mean(axis=0))
    pooled = experts * np.sum(np.mean(shares, axis=0) * np.mean(means, axis=0))
    paper = sum(np.sum(f * m) / experts for f, m in zip(shares, means, strict=True))
    return float(pooled), float(paper)
