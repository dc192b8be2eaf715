"""The golden checkpoints and how to check the model on one, within the bars of their README.

A fp32 implementation differs from the recorded float64 or fp32 numbers by up to 1e-5 in logits of
about 5, by 1e-6 in losses and by 2e-6 of the largest entry in gradients; the bars are some five
times that.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

import mmx
from mmx.training.losses import checkpoint_balance_loss

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(str(f.parent.relative_to(FOLDER)) for f in FOLDER.glob("*/*/golden.safetensors"))
LOGITS = 5e-5
LOSS = 1e-5
NEW_TOKENS = 24


class Golden(NamedTuple):
    config: mmx.ModelConfig
    params: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def tokens(self) -> np.ndarray:
        return self.arrays["input_ids"]

    @property
    def mask(self) -> np.ndarray | None:
        return self.arrays.get("attention_mask")

    @property
    def real(self) -> np.ndarray:
        return np.ones(self.tokens.shape, bool) if self.mask is None else self.mask != 0


@functools.cache
def golden(name: str) -> Golden:
    config, params = mmx.load(FOLDER / name, dtype=jnp.float32)
    return Golden(config, params, load_file(FOLDER / name / "golden.safetensors"))


def names_with(array: str) -> list[str]:
    """Cases that record an array whose name begins so; for collection, so it reads names alone."""
    found = []
    for name in NAMES:
        with safe_open(FOLDER / name / "golden.safetensors", "np") as file:
            keys = list(file.keys())
        if any(key.startswith(array) for key in keys):
            found.append(name)
    return found


def check_forward(name: str) -> None:
    """Without a cache: logits, hidden states, router logits, and the generated tokens.

    One shape, so one compile: behind the prompt lies room for the new tokens. What is there does
    not matter, because it is to the right of all that is compared.
    """
    case = golden(name)
    batch, length = case.tokens.shape
    room = ((0, 0), (0, NEW_TOKENS))
    tokens = np.pad(case.tokens, room)
    mask = None if case.mask is None else np.pad(case.mask, room)
    for step in range(NEW_TOKENS):
        out = mmx.forward(case.params, tokens, case.config, mask=mask, return_hidden=True)
        logits = np.asarray(out.logits)
        if step == 0:
            prompt = logits[:, :length], out.hidden[:, :, :length], out.aux.logits[:, :, :length]
            check_outputs(case, *prompt)
        now = length + step
        last = [np.flatnonzero(row)[-1] for row in case.real] if step == 0 else [now - 1] * batch
        tokens[:, now] = logits[np.arange(batch), last].argmax(axis=-1)
        if mask is not None:
            mask[:, now] = 1
    np.testing.assert_array_equal(tokens[:, length:], case.arrays["generated"])


def check_outputs(case: Golden, logits, hidden, router_logits) -> None:
    """Compare one pass, of mmx or of the truth, with what is recorded."""
    real = case.real
    close(np.asarray(logits)[real], case.arrays["logits"][real], LOGITS, "logits")
    recorded = case.arrays["hidden_states"]
    kept = recorded.shape[2]  # of long inputs only the last positions are recorded
    seen = np.asarray(hidden)[:, :, -kept:]
    close(seen[:, real[:, -kept:]], recorded[:, real[:, -kept:]], LOGITS, "hidden")
    if "router_logits" in case.arrays:
        recorded = case.arrays["router_logits"][:, real.reshape(-1)]
        close(np.asarray(router_logits)[:, real], recorded, LOGITS, "router_logits")


def check_cached(name: str) -> None:
    """One pass into an empty cache: logits, balance loss, the recorded lightning states."""
    case = golden(name)
    cache = mmx.init_cache(case.config, *case.tokens.shape)
    out = mmx.forward(case.params, case.tokens, case.config, mask=case.mask, cache=cache)
    real = case.real
    close(np.asarray(out.logits)[real], case.arrays["logits"][real], LOGITS, "logits")
    close(checkpoint_balance_loss(out.aux), case.arrays["aux_loss"][0], LOSS, "aux_loss")
    lightning = [i for i, kind in enumerate(case.config.layer_kinds) if kind == "lightning"]
    for place, layer in enumerate(lightning):
        state = case.arrays.get(f"linear_state.{layer}")
        if state is not None:
            bar = 5e-5 * np.abs(state).max()
            close(out.cache.lightning_states[place], state, bar, f"linear_state.{layer}")


def check_generated(name: str) -> None:
    """What an engine generates: the recorded tokens, one for one."""
    case = golden(name)
    seen = mmx.generate(
        case.params, case.tokens, case.config, mask=case.mask, max_new_tokens=NEW_TOKENS
    )
    np.testing.assert_array_equal(seen, case.arrays["generated"])


def close(seen, wanted, bar: float, what: str) -> None:
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=bar, err_msg=what)
