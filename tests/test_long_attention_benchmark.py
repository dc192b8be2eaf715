"""The cuts that benchmarks/long_attention.py compares: the same attention, whatever the cut."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import long_attention
from benchmarks.attention import SCALE, operands, relative
from pallas_kernels import softmax_attention

SETTING = long_attention.Setting(length=256, heads=4, kv_heads=2, form=long_attention.xla)


@pytest.mark.parametrize("halvings", [0, 2])
def test_every_cut_is_the_same_attention(halvings):
    q, k, v, grad = operands(1, SETTING.length, SETTING.heads, SETTING.kv_heads)

    @jax.jit
    def definition(q, k, v):
        return softmax_attention(q, k, v, scale=SCALE, implementation="reference", return_lse=True)

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    whole, pull = jax.vjp(definition, *wide)
    wanted = [*whole, *pull((grad.astype(jnp.float32), jnp.zeros_like(whole[1])))]
    parts = functools.partial(long_attention.forward, SETTING, halvings)
    seen = jax.jit(lambda *x: long_attention.by_heads(2, parts, *x))(q, k, v)
    parts = functools.partial(long_attention.backward, SETTING, halvings)
    pulled = jax.jit(lambda *x: long_attention.by_heads(2, parts, *x))(q, k, v, *seen, grad)
    for a, b in zip([*seen, *pulled], wanted, strict=True):
        assert relative(a, b) < 6e-3  # bf16 rounds at 2e-3: parts, and their sums
