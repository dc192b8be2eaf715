"""The peer of `benchmarks/inference.py`: generation by transformers' MiniMax in torch."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import torch_train
from mmx.config import ModelConfig


def measure(emit: Callable[..., None], config: ModelConfig, *, prompt: int, new: int) -> None:
    """Rows: reading a prompt, and generating after a short one for 1 and 16 rows."""
    if torch_train.MISSING:
        emit(part="peer", left_out=f"{torch_train.MISSING} is not installed")
        return
    import torch

    model = torch_train.make_model(config).eval()
    emit(**torch_train.about(model))
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)

    def ids(rows: int, length: int) -> Any:
        return torch.from_numpy(rng.integers(0, config.vocab_size, (rows, length))).to(device)

    def seconds(run: Callable[[], Any]) -> float:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        tokens = ids(1, prompt)
        took = seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1))
        emit(part="peer_prefill", tokens=prompt, seconds=took, tokens_per_s=prompt / took)
        for rows in (1, 16):
            start = ids(rows, 256)

            def generate(count: int, start: Any = start) -> Any:
                lengths = dict(max_new_tokens=count, min_new_tokens=count)
                return model.generate(start, do_sample=False, pad_token_id=0, **lengths)

            times = [seconds(functools.partial(generate, count)) for count in (1, new + 1)]
            each = (times[1] - times[0]) / new
            emit(part="peer_decode", rows=rows, ms=1e3 * each, tokens_per_s=rows / each)
