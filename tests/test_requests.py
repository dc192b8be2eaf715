import dataclasses
import json

import pytest
from random_models import small_config

from mmx.inference.requests import Result, Sampling, TokenLogprob

CONFIG = small_config("ls", vocab_size=40, max_seq_len=256, eos_token_id=7)
HUGE = 10**5000  # has no repr: more digits than Python prints

GOOD = [
    dict(),
    dict(temperature=100, top_p=1e-9, top_k=2**70, min_p=1, repetition_penalty=0.01),
    dict(temperature=1e-30, repetition_penalty=100.0),
    dict(seed=None),
    dict(seed=-(2**63)),
    dict(seed=2**63 - 1),
    dict(logit_bias={0: -100, 39: 100.0}),
    dict(logprobs=0),
    dict(logprobs=20, stop_ids=tuple(range(16)), stop=("x" * 256,) * 16),
    dict(max_new_tokens=256, ignore_eos=True),
]
BAD = [
    ("temperature", [-0.1, 100.1, float("nan"), float("inf"), "1", None, True, HUGE]),
    ("top_p", [0, 0.0, -1, 1.01, float("nan"), "1", False]),
    ("top_k", [-1, 1.0, "2", True, None, float("nan")]),
    ("min_p", [-0.01, 1.01, float("nan")]),
    ("repetition_penalty", [0, 0.001, 101, float("nan"), float("inf"), -1]),
    ("seed", [2**63, -(2**63) - 1, 1.0, "0", True, HUGE]),
    ("logprobs", [-1, 21, 1.5, True]),
    ("max_new_tokens", [0, -1, 257, 1e3, HUGE, None]),
    ("ignore_eos", [1, None, "yes"]),
    ("logit_bias", [{40: 1.0}, {-1: 1.0}, {"3": 1.0}, {True: 1.0}, {3: float("nan")}, {3: 101},
                    {3: -float("inf")}, {3: "1"}, [(3, 1.0)], None,
                    dict.fromkeys(range(301), 0.0)]),
    ("stop_ids", [(40,), (-1,), (1.0,), (True,), [1], 3, (1,) * 17]),
    ("stop", [("",), ("x" * 257,), (b"x",), "stop", ["stop"], ("x",) * 17, (None,)]),
]  # fmt: skip


@pytest.mark.parametrize("options", GOOD)
def test_what_may_be_asked(options):
    Sampling(**options).check(CONFIG)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD for value in values], ids=lambda v: ""
)
def test_what_may_not_be_asked(name, value):
    with pytest.raises(ValueError) as caught:
        Sampling(**{name: value}).check(CONFIG)
    message = str(caught.value)
    assert name in message.split(" must ")[0]
    assert "must" in message
    assert "\n" not in message
    assert len(message) < 250


def test_messages_show_the_value_and_what_is_wanted():
    cases = {
        "temperature is nan; it must be a number from 0 to 100": dict(temperature=float("nan")),
        "top_p is 0; it must be more than 0 and at most 1": dict(top_p=0),
        "max_new_tokens is 257; it must be an integer from 1 to 256": dict(max_new_tokens=257),
        "a token of stop_ids is 40; it must be an integer from 0 to 39": dict(stop_ids=(1, 40)),
        "stop has 17 entries; it must have at most 16": dict(stop=("x",) * 17),
        "logit_bias of token 3 is 101; it must be a number from -100 to 100": dict(
            logit_bias={3: 101}
        ),
    }
    for message, options in cases.items():
        with pytest.raises(ValueError) as caught:
            Sampling(**options).check(CONFIG)
        assert str(caught.value) == message


def test_tokens_that_end_a_request():
    assert Sampling(stop_ids=(3,)).end_ids(CONFIG) == (3, 7)
    assert Sampling(stop_ids=(3,), ignore_eos=True).end_ids(CONFIG) == (3,)
    without = dataclasses.replace(CONFIG, eos_token_id=None)
    assert Sampling().end_ids(without) == ()
    several = dataclasses.replace(CONFIG, eos_token_id=(7, 9))
    assert Sampling(stop_ids=(3,)).end_ids(several) == (3, 7, 9)


def test_results_are_plain_values():
    logprobs = (TokenLogprob(4, -0.5, ((4, -0.5), (2, -1.0))),)
    result = Result(tokens=(4,), logprobs=logprobs, finish_reason="stop", text="x")
    assert json.loads(json.dumps(dataclasses.asdict(result)))["tokens"] == [4]
    assert TokenLogprob(1, -2.0).top == ()
