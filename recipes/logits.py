"""A checkpoint in the released format: its logits against recorded ones, and a continuation.

    python -m recipes.logits [CHECKPOINT]

CHECKPOINT is a folder with a `golden.safetensors` beside the weights: tokens, and the logits and
greedy continuation that an independent float64 implementation computed from the same weights.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import mmx
from mmx.convert.safetensors_file import read_header, read_part

CHECKPOINT = Path("tests/golden/released/o2_bf16_4shards_zero_based")
TOLERANCE = 5e-5  # fp32 against float64, logits within +-5


def main(checkpoint: Path) -> int:
    """Load, compare, generate; 0 when everything agrees, 1 when not."""
    console = Console()
    start = time.perf_counter()
    config, params = mmx.load(checkpoint, dtype=jnp.float32)
    recorded, _ = read_header(checkpoint / "golden.safetensors")
    golden = {name: read_part(info) for name, info in recorded.items()}
    tokens = golden["input_ids"]

    output = mmx.forward(params, tokens, config)
    difference = float(np.max(np.abs(np.asarray(output.logits) - golden["logits"])))
    generated = np.asarray(
        mmx.generate(params, tokens, config, max_new_tokens=golden["generated"].shape[1])
    )
    same = int(np.sum(generated == golden["generated"]))
    total, active = mmx.count_params(config)
    passed = difference <= TOLERANCE and same == generated.size

    table = Table(show_header=False, title=f"{checkpoint.name} on {jax.devices()[0].device_kind}")
    kinds = "".join(kind[0].upper() for kind in config.layer_kinds)
    table.add_row("layers (Lightning, Softmax)", kinds)
    table.add_row("parameters, total / active", f"{total:,} / {active:,}")
    table.add_row("largest logit difference", f"{difference:.1e} (tolerance {TOLERANCE:.0e})")
    table.add_row("greedy tokens equal to the recorded", f"{same} of {generated.size}")
    table.add_row("seconds", f"{time.perf_counter() - start:.1f}")
    console.print(table)
    for row in generated:
        console.print(" ".join(str(token) for token in row), highlight=False)
    console.print("[green]all equal[/]" if passed else "[red]differs from the recorded numbers[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT))
