"""What `benchmarks/inference.py` measures."""

import argparse
import dataclasses
from dataclasses import dataclass

import mmx
from mmx.config import ModelConfig


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      config: of the model; `slice_config` that of 'slice'.
      decode: (rows, tokens of context) of 'decode', 'int8' and 'twin'.
      slice_contexts: of 'slice', one row.
      prompts: lengths of 'first', rising.
      prompt: tokens of 'prefill' and 'prefix'; chunk: read at once.
      new: tokens to generate; steps: of a dispatch.
      repeats: dispatches timed.
      copied, matmul: numbers of the copy and side of the product of 'ceilings'.
    """

    config: ModelConfig
    slice_config: ModelConfig
    decode: tuple[tuple[int, int], ...]
    slice_contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    prompt: int
    chunk: int
    new: int
    steps: int
    repeats: int
    copied: int = 1 << 30
    matmul: int = 8192


def make_setting(options: argparse.Namespace) -> Setting:
    if options.smoke:
        config = dataclasses.replace(mmx.preset("tiny"), layer_kinds=("lightning", "softmax"))
        return Setting(config, config, ((1, 256), (3, 512)), (512,),
                       (256, 512, 2048), 1024, 256, 8, 2, 2, 1 << 20, 256)  # fmt: skip
    shapes = (
        *((1, n) for n in (1024, 8192, 32_768, 1 << 18, 1 << 20, 4_000_000)),
        *((rows, 1024) for rows in (2, 4, 8, 16, 32, 64, 128, 256)),
        (16, 32_768),
        (64, 8192),
    )
    if options.shapes:
        pairs = [shape.split("x") for shape in options.shapes.split(",")]
        shapes = tuple((int(rows), int(context)) for rows, context in pairs)
    return Setting(
        config=mmx.preset(options.preset),
        slice_config=mmx.preset("slice-8"),
        decode=shapes,
        slice_contexts=(1_000_000, 4_000_000),
        prompts=(1024, 8192, 32_768, 1 << 17, 1 << 20, 4_000_000),
        prompt=32_768,
        chunk=options.chunk,
        new=256,
        steps=options.steps,
        repeats=5,
    )
