"""What `mmx extend` tells of its stages, in a line and as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def told(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a person wants to know of a stage: retrieval inside its length, beside the losses."""
    needles = row["needles"]
    return (
        ("length", f"{row['seq_len']:,}"),
        ("RoPE base", f"{row['rope_theta']:,.0f}"),
        ("held-out loss", f"{_nats(row['heldout_loss_before'])} -> {_nats(row['heldout_loss'])}"),
        ("short text", f"{row['short_loss_before']:.3f} -> {row['short_loss']:.3f}"),
        ("retrieved", f"{sum(needles['exact']) / len(needles['exact']):.0%}"),
        ("by depth", " ".join(f"{share:.0%}" for share in needles["exact"])),
        ("loss of answers", f"{needles['loss']:.3f}"),
    )


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def show(run_dir: Path, reports: Sequence[dict[str, Any]]) -> None:
    """One row a stage, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    if not reports:
        return
    title = "after each stage; losses in nats, before -> after"
    table = Table(*(name for name, _ in told(reports[0])), title=title)
    for row in reports:
        table.add_row(*(value for _, value in told(row)))
    Console().print(table)
    print(f"report: {run_dir / 'extension.json'}")
    last = run_dir / reports[-1]["run"]
    print(f"next: mmx generate {last} --prompt 'def ' (mmx verify {last} checks every byte)")
