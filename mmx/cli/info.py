"""`mmx info`: what a model is and what it needs, without allocating it."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mmx.cli.source import config_of

CONTEXTS = {"8K": 8192, "1M": 1 << 20, "4M": 1 << 22}


@dataclass(frozen=True)
class Info:
    """Layers, parameters and memory of a checkpoint or a preset."""

    model: tyro.conf.Positional[str]
    """A checkpoint folder or a preset: minimax-text-01, minimax-m1-40k, bench-4b, tiny, ..."""


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    options = tyro.cli(Info, prog="mmx info", args=arguments)
    config = config_of(options.model)
    from mmx.inference.cache import kv_bytes_per_token, state_bytes
    from mmx.model import count_params

    total, active = count_params(config)
    state, per_token = state_bytes(config), kv_bytes_per_token(config)
    pattern = ", ".join(config.superblock)
    if len(set(config.superblock)) == 2 and config.superblock[-1] == "softmax":
        pattern = f"{len(config.superblock) - 1} lightning + 1 softmax"
    if config.superblock.count("softmax") != 1:
        pattern = ", ".join(config.superblock)

    table = Table(show_header=False, title=options.model)
    table.add_row("layers", f"{config.num_layers} = {config.num_superblocks} x ({pattern})")
    table.add_row("width", f"{config.embed_dim}, vocabulary {config.vocab_size:,}")
    kv = f"{config.num_kv_heads} key/value heads in softmax layers"
    table.add_row("attention", f"{config.num_heads} heads x {config.head_dim}, {kv}")
    experts = f"{config.num_experts} x {config.expert_dim}, {config.num_experts_per_tok} a token"
    table.add_row("experts", experts)
    table.add_row("longest sequence", f"{config.max_seq_len:,} tokens")
    table.add_row("parameters", f"{total:,} ({total / 1e9:.2f} B)")
    table.add_row("  active a token", f"{active:,} ({active / 1e9:.2f} B), no embedding or head")
    table.add_row("  in bf16", decimal(2 * total))
    table.add_row("lightning state a sequence", f"{decimal(state)} fp32, any length")
    table.add_row("keys and values a token", f"{decimal(per_token)} bf16")
    for name, tokens in CONTEXTS.items():
        keys = decimal(per_token * tokens)
        row = f"{decimal(state + per_token * tokens)} = state + {keys}"
        table.add_row(f"  a sequence of {name}", row)
    Console().print(table)
    return 0
