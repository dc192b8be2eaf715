"""Needle retrieval: what is asked, and the score against logits of the whole model."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mmx
from mmx.data import tokenizer as bpe
from mmx.data.facts import question
from mmx.evaluation import needles
from mmx.evaluation.needles import needle_accuracy, needle_prompts
from mmx.placement import make_partition, param_shardings
from sharding import MeshConfig

FACT = re.compile(r"The number of (\w+) is (\d{4})\.\n")
TEXT = [
    "The number of Oslo is 1234.\n",
    "What is the number of Quito? It is 5678.\n",
    "Winter garden kept a long letter under the quiet window.\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train_tokenizer(TEXT, vocab_size=300)


@pytest.fixture(scope="module")
def merging():
    """Numbers are not split, and a word has the space before it: ' 12' is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    numbers = [f"It is {n}.\n" for n in range(1000, 10_000, 7)]
    tokenizer.train_from_iterator(TEXT + numbers, trainer)
    return tokenizer


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", ["tokenizer", "merging"])
@pytest.mark.parametrize("length", [220, 1000])
def test_prompt_and_answer_have_the_length_and_say_the_fact(request, name, length):
    tokenizer = request.getfixturevalue(name)
    prompts = needle_prompts(tokenizer, length=length, depths=(0, 0.3, 1), count=4, seed=1)
    assert len(prompts) == 12
    split = set()
    for prompt, answer in prompts:
        ids = np.concatenate([prompt, answer])
        assert len(ids) == length
        text = tokenizer.decode(ids.tolist())
        ((place, number),) = FACT.findall(text)
        asked = f"\nWhat is the number of {place}? It is {number}"
        assert text.endswith(asked)
        assert text.count(number) == 2
        # The answer holds the number whole and nothing before it but a space.
        assert tokenizer.decode(answer.tolist()) in (number, f" {number}")
        split.add(tokenizer.decode(answer.tolist())[0])
        # Greedy decoding goes through the tokens of the text as the tokenizer has them.
        whole = bpe.encode(tokenizer, asked[1:] + ".")
        np.testing.assert_array_equal(whole[-len(answer) - 1 : -1], answer)
    assert split <= ({" "} if name == "merging" else set("123456789"))


@pytest.mark.parametrize("haystack", [None, "text"])
def test_the_needle_is_at_its_depth(tokenizer, haystack):
    length, depths = 4000, (0.0, 0.25, 0.5, 0.9, 1.0)
    text = None
    if haystack:
        lines = [f"line {i} of a text that is given\n" for i in range(2000)]
        text = bpe.encode(tokenizer, "".join(lines))
    prompts = needle_prompts(
        tokenizer, length=length, depths=depths, count=3, seed=2, haystack=text
    )
    for i, (prompt, _) in enumerate(prompts):
        written = tokenizer.decode(prompt.tolist())
        (found,) = FACT.finditer(written)
        before = len(bpe.encode(tokenizer, written[: found.start()]))
        after = len(bpe.encode(tokenizer, written[found.end() : written.index("What is")]))
        # Half a line of at most a hundred tokens is 50.
        assert abs(before - depths[i // 3] * (before + after)) <= 51
        assert ("of a text that is given" in written) == bool(haystack)
        assert found.start() == 0 or written[found.start() - 1] == "\n"


def test_other_needles_lie_about(tokenizer):
    prompts = needle_prompts(tokenizer, length=3000, depths=(0.5,), count=8, seed=3, needles=10)
    last = 0
    for prompt, answer in prompts:
        text = tokenizer.decode(prompt.tolist())
        facts = FACT.findall(text)
        assert len(dict(facts)) == len(facts) == 10
        (asked,) = re.findall(r"What is the number of (\w+)\? It is $", text)
        assert dict(facts)[asked] == tokenizer.decode(answer.tolist())
        last += facts[-1][0] == asked
    assert last < 4  # in the middle by depth; among ten, which comes last is another


def test_prompts_depend_on_the_seed_alone(tokenizer):
    def ids(seed):
        prompts = needle_prompts(tokenizer, length=300, depths=(0.5, 1), count=5, seed=seed)
        return [tuple(np.concatenate(prompt).tolist()) for prompt in prompts]

    assert ids(0) == ids(0)
    assert len({*ids(0), *ids(1)}) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "at least one of each"),
        ({"depths": (0.5, 1.1)}, "1.1"),
        ({"depths": (float("nan"),)}, "nan"),
        ({"count": 0}, "count is 0"),
        ({"length": 12}, "length is 12"),
        ({"needles": 17}, "1 to 16"),
        ({"needles": 0}, "1 to 16"),
        ({"haystack": [1, 2, 3]}, "hide them in has 3"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, changes, message):
    arguments = {"length": 300, "depths": (0.5,), "count": 1, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        needle_prompts(tokenizer, **arguments)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the score


@pytest.fixture(scope="module")
def model():
    config = small_config("s", vocab_size=300, max_seq_len=400, chunk_size=64)
    return config, random_params(config, 0)


def expected(params, config, prompts):
    """Losses of the answers' tokens from the logits of every position."""
    ids = np.stack([np.concatenate(prompt) for prompt in prompts]).astype(np.int32)
    logits = np.asarray(mmx.forward(params, ids, config).logits, np.float64)
    losses = []
    for (prompt, answer), row in zip(prompts, logits, strict=True):
        at = row[len(prompt) - 1 : -1]
        most = at.max(-1, keepdims=True)
        logs = at - most - np.log(np.exp(at - most).sum(-1, keepdims=True))
        losses.append(-logs[np.arange(len(answer)), answer])
    return losses


@pytest.mark.parametrize(
    ("name", "batch_size", "mesh"),
    [
        ("tokenizer", 16, None),
        ("merging", 4, None),
        ("merging", 4, MeshConfig(fsdp=2, seq=2)),
    ],
)
def test_loss_is_that_of_all_logits(request, model, name, batch_size, mesh):
    """Also where answers differ in their number of tokens, and where the last batch is short."""
    tokenizer = request.getfixturevalue(name)
    config, params = model
    config = dataclasses.replace(config, vocab_size=bpe.vocab_size(tokenizer))
    params, partition = random_params(config, 0), None
    asked = {"length": 180, "depths": (0.2, 0.8), "count": 5, "seed": 4}
    prompts = needle_prompts(tokenizer, **asked)
    sizes = {len(answer) for _, answer in prompts}
    assert len(sizes) > 1 if name == "merging" else sizes == {4}
    losses = expected(params, config, prompts)
    if mesh is not None:
        partition = make_partition(mesh, "long_context", config, devices=jax.devices()[:4])
        params = jax.device_put(params, param_shardings(config, partition))
    result = needle_accuracy(
        params, config, tokenizer, batch_size=batch_size, partition=partition, **asked
    )
    # fp32 logits of a model of one layer: 1e-6 relative, and sums in another order.
    assert result.loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert (result.length, result.depths) == (180, (0.2, 0.8))


def test_accuracy_of_a_model_that_knows_the_next_token_from_the_last(tokenizer):
    """Layers silenced, embedding and head made so that a 4 comes after spaces and digits."""
    size = bpe.vocab_size(tokenizer)
    config = small_config("s", vocab_size=size, embed_dim=size, max_seq_len=400)
    params = jax.tree.map(jnp.zeros_like, random_params(config, 0))
    follows = np.random.default_rng(0).permutation(size)
    (space,), digits = bpe.encode(tokenizer, " "), [
        int(bpe.encode(tokenizer, str(d))[0]) for d in range(10)
    ]  # fmt: skip
    follows[[space, *digits]] = digits[4]
    params["embed"]["embedding"] = jnp.eye(size)
    params["head"]["kernel"] = jnp.zeros((size, size)).at[np.arange(size), follows].set(9.0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + float(getattr(path[-1], "key", "") == "scale"), params
    )
    asked = {"length": 200, "depths": (0.0, 1.0), "count": 60, "seed": 5}
    right = []
    for _, answer in needle_prompts(tokenizer, **asked):
        before = [int(space), *answer[:-1].tolist()]
        right.append([int(follows[b]) == a for b, a in zip(before, answer, strict=True)])
    share = np.mean(right)
    assert 0.05 < share < 0.2  # about a tenth
    result = needle_accuracy(params, config, tokenizer, batch_size=64, **asked)
    assert result.token_accuracy == pytest.approx(share, abs=1e-9)
    assert result.exact == tuple(np.all(right, axis=1).reshape(2, 60).mean(1).tolist())


def test_exact_needs_every_token(tokenizer, model, monkeypatch):
    """A model that sees the next token, but takes every 7 for another: shares counted by hand."""
    config = dataclasses.replace(model[0], max_seq_len=401)  # a program of its own
    (seven,) = bpe.encode(tokenizer, "7")

    def clairvoyant(params, tokens, config, **options):
        following = jnp.roll(tokens, -1, axis=1)
        return jax.nn.one_hot(jnp.where(following == seven, seven + 1, following), 300), *[None] * 3

    monkeypatch.setattr(needles, "backbone", clairvoyant)
    monkeypatch.setattr(needles, "unembed", lambda params, x, config: 30 * x)
    asked = {"length": 250, "depths": (0.1, 0.5, 0.9), "count": 20, "seed": 7}
    answers = [
        tokenizer.decode(answer.tolist()) for _, answer in needle_prompts(tokenizer, **asked)
    ]
    result = needle_accuracy({}, config, tokenizer, batch_size=7, **asked)
    want = np.array(["7" not in answer for answer in answers]).reshape(3, 20).mean(1)
    assert 0.3 < want.min() < want.max() < 1
    assert result.exact == pytest.approx(tuple(want), abs=1e-9)
    assert result.mean_exact == pytest.approx(want.mean(), abs=1e-9)
    sevens = np.mean([c == "7" for answer in answers for c in answer])
    assert result.token_accuracy == pytest.approx(1 - sevens, abs=1e-9)
    # Right tokens cost log(1 + 299 exp(-30)), about 0; a 7 costs 30.
    assert result.loss == pytest.approx(30 * sevens, rel=1e-4)


def test_one_program_for_a_length(tokenizer, model):
    config, params = model
    before = needles._score._cache_size()
    for seed, count in ((0, 3), (1, 5)):
        needle_accuracy(
            params, config, tokenizer, length=190, depths=(0.5,), count=count, seed=seed,
            batch_size=4,
        )  # fmt: skip
    assert needles._score._cache_size() == before + 1


def test_logits_of_answers_alone(tokenizer, model):
    """The program holds no array of [length, vocab]."""
    config, params = model
    tokens = np.zeros((2, 390), np.int32)
    program = needles._score.lower(params, tokens, config, 4, None).as_text()
    assert "x4x300xf32" in program
    assert "390x300x" not in program
    assert question("Oslo").endswith(" ")


def test_what_a_model_cannot_take_is_refused(tokenizer, model):
    config, params = model
    asked = {"depths": (0.5,), "count": 1, "seed": 0}
    with pytest.raises(ValueError, match="max_seq_len=400"):
        needle_accuracy(params, config, tokenizer, length=401, batch_size=1, **asked)
    with pytest.raises(ValueError, match="batch_size is 0"):
        needle_accuracy(params, config, tokenizer, length=200, batch_size=0, **asked)
    small = dataclasses.replace(config, vocab_size=60)
    with pytest.raises(ValueError, match="vocab_size=60"):
        needle_accuracy(params, small, tokenizer, length=200, batch_size=1, **asked)
