"""MiniMax-01 once more, in float64 numpy, written from the papers and facts and not from mmx.

Slow and plain on purpose: token after token, head after head where it helps, every packed sample
on its own and without padding. Tests compare mmx with this; it must never import mmx's layers.
"""

import math
from typing import Any, NamedTuple

import numpy as np

Tree = dict[str, Any]


def wide(tree):
    """A nested dict of arrays (jax or numpy, any float type) as float64 numpy."""
    if isinstance(tree, dict):
        return {name: wide(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)


# ---------------------------------------------------------------- segments


def samples(ids: np.ndarray) -> list[np.ndarray]:
    """Indices of the tokens of each packed sample of one row, in order; padding (0) in none."""
    found: list[list[int]] = []
    current = 0
    for index, segment in enumerate(ids):
        if segment == 0:
            continue
        if segment != current:
            found.append([])
            current = segment
        found[-1].append(index)
    return [np.array(indices) for indices in found]


# ---------------------------------------------------------------- lightning attention


def recurrence(q, k, v, slopes, state):
    """One sample: q, k [T, H, K], v [T, H, V], state [H, K, V] -> outputs, all states [T+1, ...].

    S_t = exp(-s) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t.
    """
    states = [state]
    out = np.zeros(v.shape)
    for t in range(len(q)):
        states.append(
            np.exp(-slopes)[:, None, None] * states[-1] + k[t][:, :, None] * v[t][:, None, :]
        )
        out[t] = np.einsum("hk,hkv->hv", q[t], states[-1])
    return out, np.array(states)


def recurrence_gradients(q, k, v, slopes, states, grad_out, grad_final):
    """The recurrence of one sample run backwards: gradients of q, k, v and of its first state."""
    grad_q, grad_k, grad_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    grad_state = grad_final
    for t in reversed(range(len(q))):
        grad_state = grad_state + q[t][:, :, None] * grad_out[t][:, None, :]
        grad_q[t] = np.einsum("hkv,hv->hk", states[t + 1], grad_out[t])
        grad_k[t] = np.einsum("hkv,hv->hk", grad_state, v[t])
        grad_v[t] = np.einsum("hkv,hk->hv", grad_state, k[t])
        grad_state = np.exp(-slopes)[:, None, None] * grad_state
    return grad_q, grad_k, grad_v, grad_state


class Lightning(NamedTuple):
    out: np.ndarray
    final_state: np.ndarray
    grad_q: np.ndarray
    grad_k: np.ndarray
    grad_v: np.ndarray
    grad_initial_state: np.ndarray


def lightning(q, k, v, slopes, initial_state, segment_ids, grad_out, grad_final) -> Lightning:
    """Batch of [B, T, H, ...] rows, sample by sample: outputs, final states, all gradients."""
    q, k, v, slopes, grad_out, grad_final = map(wide, (q, k, v, slopes, grad_out, grad_final))
    batch, length, heads, key_dim = q.shape
    zero = np.zeros((heads, key_dim, v.shape[3]))
    initial = np.zeros((batch, *zero.shape)) if initial_state is None else wide(initial_state)
    ids = np.ones((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    # A row without a sample keeps its state, so the state's gradient passes through.
    result = Lightning(
        np.zeros(v.shape),
        initial.copy(),
        np.zeros(q.shape),
        np.zeros(k.shape),
        np.zeros(v.shape),
        grad_final.copy(),
    )
    for row in range(batch):
        found = samples(ids[row])
        for number, at in enumerate(found):
            first, last = number == 0, number == len(found) - 1
            one = (q[row, at], k[row, at], v[row, at], slopes)
            out, states = recurrence(*one, initial[row] if first else zero)
            *grads, grad_first = recurrence_gradients(
                *one, states, grad_out[row, at], grad_final[row] if last else zero
            )
            result.out[row, at] = out
            for array, grad in zip(result[2:5], grads, strict=True):
                array[row, at] = grad
            if first:
                result.grad_initial_state[row] = grad_first
            if last:
                result.final_state[row] = states[-1]
    return result


# ---------------------------------------------------------------- softmax attention


class Softmax(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    grad_q: np.ndarray
    grad_k: np.ndarray
    grad_v: np.ndarray


def softmax_attention(q, k, v, visible, scale, grad_out=None, grad_lse=None) -> Softmax:
    """Dense grouped-query attention; `visible` [B, T, S] says which keys a query sees."""
    q, k, v = map(wide, (q, k, v))
    grad_out = np.zeros((*q.shape[:3], v.shape[3])) if grad_out is None else wide(grad_out)
    grad_lse = np.zeros(q.shape[:3]) if grad_lse is None else wide(grad_lse)
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    grad_q, grad_k, grad_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    repeats = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            queries, keys, values = q[b, :, h], k[b, :, h // repeats], v[b, :, h // repeats]
            scores = np.where(visible[b], scale * queries @ keys.T, -np.inf)
            sees = visible[b].any(axis=1)
            top = np.where(sees, scores.max(axis=1, initial=-np.inf), 0.0)
            weights = np.exp(scores - top[:, None])
            total = np.where(sees, weights.sum(axis=1), 1.0)
            weights = weights / total[:, None]
            out[b, :, h] = weights @ values
            lse[b, :, h] = np.where(sees, np.log(total) + top, -np.inf)
            grad = grad_out[b, :, h]
            toward = grad @ values.T - np.sum(grad * out[b, :, h], axis=1, keepdims=True)
            grad_scores = scale * weights * (toward + grad_lse[b, :, h][:, None])
            grad_q[b, :, h] = grad_scores @ keys
            grad_k[b, :, h // repeats] += grad_scores.T @ queries
            grad_v[b, :, h // repeats] += weights.T @ grad
    return Softmax(out, lse, grad_q, grad_k, grad_v)


# ---------------------------------------------------------------- grouped matmul


def grouped_matmul(x, w, group_sizes, grad_out):
    """Row group after row group: (out, gradient of x, gradient of w)."""
    x, w, grad_out = map(wide, (x, w, grad_out))
    out, grad_x, grad_w = np.zeros(grad_out.shape), np.zeros(x.shape), np.zeros(w.shape)
    begin = 0
    for group, size in enumerate(group_sizes):
        rows = slice(begin, begin + size)
        out[rows] = x[rows] @ w[group]
        grad_x[rows] = grad_out[rows] @ w[group].T
        grad_w[group] = x[rows].T @ grad_out[rows]
        begin += size
    return out, grad_x, grad_w


# ---------------------------------------------------------------- the model


def base_slopes(heads: int, kind: str) -> list[float]:
    """ALiBi's slopes, as its authors' code writes them, or the plain geometric series."""
    if kind == "geometric":
        return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]

    def power_of_two(n: int) -> list[float]:
        start = 2.0 ** -(2.0 ** -(math.log2(n) - 3))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    below = 2 ** math.floor(math.log2(heads))
    return power_of_two(below) + base_slopes(2 * below, "alibi")[0::2][: heads - below]


def decay_slopes(config) -> np.ndarray:
    """[layers, heads]; the layer counts among all layers, softmax ones included."""
    layers = config.num_layers
    factors = [
        1 - (l / (layers - 1 + config.slope_layer_epsilon) if l else 0) + 1e-5
        for l in range(layers)  # noqa: E741
    ]
    return np.outer(factors, base_slopes(config.num_heads, config.slope_base))


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rotate(x, rotary_dim, theta):
    """RoPE of x [T, H, K] at positions 0..T-1: channel i < r/2 pairs with i + r/2."""
    half = rotary_dim // 2
    out = x.copy()
    for t in range(len(x)):
        for i in range(half):
            angle = t * theta ** (-2 * i / rotary_dim)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class Sample(NamedTuple):
    """One unpadded sample through the model."""

    logits: np.ndarray  # [T, vocab]
    hidden: np.ndarray  # [L + 1, T, D]: embeddings, layers but the last, final norm
    router_logits: np.ndarray  # [L, T, E]
    states: np.ndarray  # [lightning layers, H, K, V]


def run_sample(params: Tree, tokens: np.ndarray, config) -> Sample:
    """The whole model on one sequence without padding; `params` from `wide`."""
    period = len(params["blocks"])
    slopes = decay_slopes(config)
    x = params["embed"]["embedding"][tokens]
    hidden, router_logits, states = [x], [], []
    for layer, kind in enumerate(config.layer_kinds):
        p = _pick(params["blocks"][f"layer_{layer % period}"], layer // period)
        a = rms_norm(x, p["attention_norm"]["scale"], config.norm_epsilon)
        if kind == "lightning":
            branch, state = _lightning_layer(p["attention"], a, slopes[layer], config)
            states.append(state)
            alpha, beta = config.lightning_alpha, config.lightning_beta
        else:
            branch = _softmax_layer(p["attention"], a, config)
            alpha, beta = config.softmax_alpha, config.softmax_beta
        y = alpha * (a if config.post_norm else x) + beta * branch
        b = rms_norm(y, p["mlp_norm"]["scale"], config.norm_epsilon)
        branch, logits = _moe_layer(p["moe"], b, config)
        router_logits.append(logits)
        x = config.mlp_alpha * (b if config.post_norm else y) + config.mlp_beta * branch
        hidden.append(x)
    x = rms_norm(x, params["final_norm"]["scale"], config.norm_epsilon)
    head = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    no_states = np.zeros((0, config.num_heads, config.head_dim, config.head_dim))
    return Sample(
        x @ head,
        np.array([*hidden[:-1], x]),
        np.array(router_logits),
        np.array(states) if states else no_states,
    )


def _pick(tree, index):
    return {n: _pick(v, index) if isinstance(v, dict) else v[index] for n, v in tree.items()}


def _lightning_layer(p, a, slopes, config):
    length, heads, head_dim = len(a), config.num_heads, config.head_dim
    qkv = silu(np.einsum("td,dhck->thck", a, p["qkv_proj"]))
    out, states = recurrence(
        qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], slopes, np.zeros((heads, head_dim, head_dim))
    )
    out = out.reshape(length, heads * head_dim)
    out = rms_norm(out, p["norm"]["scale"], config.lightning_norm_epsilon)
    gate = np.einsum("td,dhk->thk", a, p["gate_proj"]).reshape(length, heads * head_dim)
    return (out * sigmoid(gate)) @ p["out_proj"].reshape(heads * head_dim, -1), states[-1]


def _softmax_layer(p, a, config):
    q = rotate(np.einsum("td,dhk->thk", a, p["q_proj"]), config.rotary_dim, config.rope_theta)
    k = rotate(np.einsum("td,dhk->thk", a, p["k_proj"]), config.rotary_dim, config.rope_theta)
    v = np.einsum("td,dhk->thk", a, p["v_proj"])
    causal = np.tril(np.ones((1, len(a), len(a)), bool))
    scale = 1 / math.sqrt(config.head_dim)
    out = softmax_attention(q[None], k[None], v[None], causal, scale).out[0]
    return np.einsum("thk,hkd->td", out, p["out_proj"])


def _moe_layer(p, b, config):
    logits = b @ p["router"]["kernel"]
    probabilities = softmax(logits)
    out = np.zeros(b.shape)
    for t in range(len(b)):
        chosen = np.argsort(-probabilities[t], kind="stable")[: config.num_experts_per_tok]
        total = probabilities[t, chosen].sum()
        for e in chosen:
            expert = gated_mlp(b[t], p["gate_proj"][e], p["up_proj"][e], p["down_proj"][e])
            out[t] += probabilities[t, e] / total * expert
    if config.shared_expert_dim:
        shared = p["shared_expert"]
        mix = sigmoid(b @ p["shared_coefficient"])
        shared = gated_mlp(b, shared["gate_proj"], shared["up_proj"], shared["down_proj"])
        out = out * (1 - mix) + shared * mix
    return out, logits


def gated_mlp(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Model(NamedTuple):
    """A batch through the model; zeros at padding. States are those of each row's last sample."""

    logits: np.ndarray
    hidden: np.ndarray
    router_logits: np.ndarray
    states: np.ndarray
    margin: float  # least distance between the last expert chosen and the first one left out


def forward(params: Tree, tokens, config, *, mask=None, segment_ids=None) -> Model:
    """Each sample of each row alone and unpadded: what packing and padding must amount to."""
    params, tokens = wide(params), np.asarray(tokens)
    ids = np.ones(tokens.shape, int) if segment_ids is None else np.asarray(segment_ids)
    ids = ids if mask is None else np.where(np.asarray(mask) != 0, ids, 0)
    layers, lightning_layers = config.num_layers, config.layer_kinds.count("lightning")
    logits = np.zeros((*tokens.shape, config.vocab_size))
    hidden = np.zeros((layers + 1, *tokens.shape, config.embed_dim))
    router_logits = np.zeros((layers, *tokens.shape, config.num_experts))
    state_shape = (config.num_heads, config.head_dim, config.head_dim)
    states = np.zeros((lightning_layers, len(tokens), *state_shape))
    margin = math.inf
    for row in range(len(tokens)):
        for at in samples(ids[row]):
            one = run_sample(params, tokens[row, at], config)
            logits[row, at] = one.logits
            hidden[:, row, at] = one.hidden
            router_logits[:, row, at] = one.router_logits
            states[:, row] = one.states
            ranked = -np.sort(-one.router_logits, axis=-1)
            if config.num_experts_per_tok < config.num_experts:
                k = config.num_experts_per_tok
                margin = min(margin, float(np.min(ranked[..., k - 1] - ranked[..., k])))
    return Model(logits, hidden, router_logits, states, margin)
