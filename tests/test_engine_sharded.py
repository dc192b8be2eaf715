"""The engine over 4 devices: experts, heads and pages spread, tokens those of one device."""

import jax
import numpy as np
import pytest
from random_models import random_params, random_tokens, small_config

from mmx.inference import memory_plan
from mmx.inference.engine import Engine
from mmx.inference.memory_plan import plan_engine
from mmx.inference.quantize import quantize
from mmx.inference.requests import Sampling
from sharding import MeshConfig, Partition, make_mesh
from sharding.rules import SERVING

CONFIG = small_config("ls", num_heads=8, num_kv_heads=4, max_seq_len=1024)
PARAMS = quantize(random_params(CONFIG, 0), CONFIG)
MESH = make_mesh(MeshConfig(fsdp=1, expert=2, seq=2), jax.devices()[:4])
SPREAD = Partition(MESH, SERVING)
OPTIONS = dict(rows=4, pages=48, max_seq_len=640, page_size=8, chunk=256, decode_steps=2)


def requests():
    """A document read twice, so that its beginning is kept, and short ones beside it."""
    document = random_tokens(CONFIG, (1, 264), 1)[0].tolist()
    short = [random_tokens(CONFIG, (1, n), n)[0].tolist() for n in (3, 32, 30)]
    prompts = [document, *short, [*document[:260], 7, 8]]
    drawn = dict(temperature=0.9, top_p=0.9, seed=3)
    each = [
        Sampling(max_new_tokens=n, logprobs=0, **(drawn if n % 2 else {}))
        for n in (20, 44, 17, 35, 10)
    ]
    return prompts, each


def test_tokens_are_those_of_one_device(monkeypatch):
    """Weights in int8; pages for a part of the rows, so that some are sent away and come back."""
    engine = Engine(CONFIG, PARAMS, partition=SPREAD, **OPTIONS)
    away, placed = [], jax.tree.map(lambda x: x.sharding, engine.pool)
    send = engine._send_away
    engine._send_away = lambda request: (away.append(request.number), send(request))
    prompts, each = requests()
    results = engine.generate(prompts[:4], each[:4])
    assert away, "nobody was sent away"
    for x, where in zip(jax.tree.leaves(engine.pool), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    engine.generate(prompts[:1], max_new_tokens=1)  # keeps its beginning
    results += engine.generate(prompts[4:], each[4:])
    assert engine.snapshots.hits >= 1
    alone = Engine(CONFIG, PARAMS, **{**OPTIONS, "pages": 200}).generate(*requests())
    for seen, wanted in zip(results, alone, strict=True):
        assert seen.tokens == wanted.tokens
        # fp32 sums in another order: 1e-6 of logits of size 3.
        np.testing.assert_allclose(
            [x.logprob for x in seen.logprobs], [x.logprob for x in wanted.logprobs], atol=1e-5
        )
    engine.snapshots.clear()
    assert engine.pages.free == engine.pool.num_pages == 48
    monkeypatch.setattr(memory_plan, "_work", lambda program: 0)
    plan = plan_engine(CONFIG, PARAMS, partition=SPREAD, **OPTIONS)
    assert plan.states == engine.pool.lightning_states.addressable_shards[0].data.nbytes
    pages = engine.pool.key_pages.addressable_shards[0].data
    assert pages.shape == (1, 24, 8, 2, 8)  # half the pages, two key heads of four
    assert plan.pages == 2 * pages.nbytes
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(engine.params)]
    assert plan.parameters == sum(held) < sum(x.nbytes for x in jax.tree.leaves(PARAMS)) * 0.55
    assert plan.prefixes == engine.snapshots.states.addressable_shards[0].data.nbytes
    assert plan.batch == sum(x.nbytes for x in jax.tree.leaves(engine.rows))


def test_rules_that_split_rows_are_refused():
    spread = Partition(make_mesh(MeshConfig(fsdp=1, data=2, tensor=4)), SERVING)
    with pytest.raises(ValueError, match="split the rows of an engine or their tokens"):
        Engine(CONFIG, PARAMS, partition=spread, **OPTIONS)
