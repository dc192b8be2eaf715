"""What an engine takes: known to the byte beforehand, and what narrower keys and values cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, PARAMS, make, requests
from random_models import random_params, random_tokens

from mmx.inference import decoding, memory_plan
from mmx.inference.decoding import decode
from mmx.inference.engine import Engine
from mmx.inference.memory_plan import pages_within, plan_engine
from mmx.inference.quantize import quantize

OPTIONS = dict(rows=4, pages=16, max_seq_len=256, page_size=16, decode_steps=8)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("form", ["fp32", "int8, fp8"])
def test_arrays_are_known_to_the_byte(monkeypatch, form):
    monkeypatch.setattr(memory_plan, "_work", lambda program: 7)  # compiles: see below
    params, options = PARAMS, {**OPTIONS, "snapshots": 3}
    if form != "fp32":
        params = quantize(random_params(CONFIG, 0, jnp.bfloat16), CONFIG)
        options["kv_dtype"] = jnp.float8_e4m3fn
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    plan = plan_engine(CONFIG, abstract, **options)
    engine = Engine(CONFIG, params, **options)
    assert plan.parameters == nbytes(params)
    assert plan.states == nbytes(engine.pool.lightning_states)
    assert plan.pages == nbytes((engine.pool.key_pages, engine.pool.value_pages))
    # One softmax layer, keys and values, 16 pages of 16 tokens, 2 heads of 8.
    assert plan.pages == 2 * 16 * 16 * 2 * 8 * (4 if form == "fp32" else 1)
    assert plan.prefixes == nbytes(engine.snapshots.states) == 3 * plan.states // 4
    assert plan.batch == nbytes(engine.rows)
    assert plan.total == 7 + sum(value for _, value in plan.lines()[:-2])
    assert plan.lines()[-1] == ("total", plan.total)


def test_work_is_what_the_compiler_says():
    """Beside arguments, which the programs give back in place: no second pool."""
    engine = make()
    program = decode.lower(
        PARAMS, engine.pool, engine.rows, config=CONFIG, steps=8, implementation=None,
        partition=None,
    )  # fmt: skip
    stats = program.compile().memory_analysis()
    chosen = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert memory_plan._work(program) == stats.temp_size_in_bytes + chosen
    assert stats.alias_size_in_bytes >= nbytes((engine.pool, engine.rows))
    assert chosen < 8 * 4 * (2 * 4 + 2 + 2 * 20 * 4) + 1024  # tokens, flags, the 20 likeliest


def test_pages_for_a_memory(monkeypatch):
    monkeypatch.setattr(memory_plan, "_work", lambda program: 1000)
    plan = plan_engine(CONFIG, PARAMS, **OPTIONS)
    page = plan.pages // 16
    for pages in (1, 5, 40):
        memory = plan.total + (pages - 16) * page
        assert pages_within(memory, plan, 16) == pages
        assert pages_within(memory + page - 1, plan, 16) == pages
    with pytest.raises(ValueError, match="take fewer rows, a smaller chunk or int8 weights"):
        pages_within(plan.total - plan.pages + page - 1, plan, 16)


def test_fp8_keys_and_values_cost_little():
    """3 bits of mantissa: a key or value is off by up to 1/16, 1/45 in the root mean square.

    Scores of size 1 and outputs of one softmax layer of two are off by as much at most, and the
    residual they are added to is not: log-probabilities by less than 1/20.
    """
    prompts = [random_tokens(CONFIG, (1, n), n)[0].tolist() for n in (90, 31)]
    options = dict(max_new_tokens=1, logprobs=20)
    wide, narrow = make(), make(kv_dtype="float8_e4m3fn")
    assert nbytes(narrow.pool.key_pages) * 4 == nbytes(wide.pool.key_pages)
    errors = []
    for seen, wanted in zip(
        narrow.generate(prompts, **options), wide.generate(prompts, **options), strict=True
    ):
        (seen,), (wanted,) = seen.logprobs, wanted.logprobs
        wanted = dict(wanted.top)
        errors += [value - wanted[token] for token, value in seen.top if token in wanted]
    assert len(errors) >= 30
    error = np.sqrt(np.mean(np.square(errors)))
    assert 1e-4 < error < 0.05, error


def test_other_dtypes_are_refused():
    with pytest.raises(
        ValueError, match="kv_dtype is int8; it must be one of float32, bfloat16, f"
    ):
        make(kv_dtype="int8")
    with pytest.raises(ValueError, match="max_seq_len is 0; it must be at least 1"):
        make(max_seq_len=0)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_step_that_raises_takes_its_requests_and_nothing_else(monkeypatch, program):
    """It has donated the memory by then."""
    prompts, samplings = zip(*requests(6, 1), strict=True)
    wanted = make().generate(prompts, samplings)
    run, broken = getattr(decoding, program), [True]

    def failing(*arguments, **options):
        done = run(*arguments, **options)
        if broken:
            broken.pop()
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return done

    monkeypatch.setattr(f"mmx.inference.engine.{program}", failing)
    engine = make()
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        engine.generate(prompts, samplings)
    assert engine.idle
    assert engine.pages.free == engine.pool.num_pages
    assert engine.generate(prompts, samplings) == wanted
