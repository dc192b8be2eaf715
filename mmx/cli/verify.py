"""`mmx verify`: is a checkpoint what was written, and are two checkpoints the same?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmx import integrity
from mmx.convert.memory import parse_size
from mmx.training import folders

SHOWN = 10  # differences printed; all are counted


@dataclass(frozen=True)
class Verify:
    """Check every byte of a checkpoint against its digests, or compare two checkpoints.

    With one folder: of a run of `mmx train`, of its checkpoints, of one step, or written by
    `mmx convert`. With two, of any forms: tensor by tensor, bit by bit. The exit code is 1 where
    two differ, and 2 where one is damaged.
    """

    path: tyro.conf.Positional[Path]
    """The folder to check."""
    other: tyro.conf.Positional[Path | None] = None
    """Another checkpoint to compare it with; digests are not looked at."""
    logits: int = 0
    """With two: also run this many tokens through both models, whole in memory one at a time."""
    max_header: str = "8MiB"
    """With two: what the header of a safetensors file may have."""


def main(arguments: Sequence[str]) -> int:
    """Print one line a step, or the tensors that differ."""
    options = tyro.cli(Verify, prog="mmx verify", args=arguments)
    if options.logits < 0:
        raise ValueError(f"--logits is {options.logits}; give a number of tokens")
    if options.other is not None:
        same = _compare(options.path, options.other, parse_size(options.max_header, "--max-header"))
        if options.logits:
            same &= _compare_logits(options.path, options.other, options.logits)
        return 0 if same else 1
    if options.logits:
        raise ValueError("--logits compares two checkpoints; name the other one, too")
    return _check(options.path)


def _check(path: Path) -> int:
    damage: list[str] = []
    for name, folder in _checkpoints(path).items():
        try:
            seen = integrity.verify(folder)
        except integrity.DamagedCheckpoint as error:
            damage.append(str(error))
            print(f"{name}: damaged")
        else:
            print(f"{name}: whole, {seen.files} files, {seen.bytes:,} bytes", flush=True)
    if damage:
        more = f" (and {len(damage) - 1} more damaged)" if len(damage) > 1 else ""
        raise ValueError(damage[0] + more)
    return 0


def _checkpoints(path: Path) -> dict[str, Path]:
    """Folders with a manifest by what to call them."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder")
    if not path.is_dir():
        raise ValueError(f"{path}: not a folder; give the folder of a checkpoint or a run")
    if (path / integrity.MANIFEST).exists():
        return {path.name: path}
    if (path / "config.json").exists():
        raise ValueError(
            f"{path}: has no {integrity.MANIFEST} to check it against; compare it with another "
            "checkpoint: mmx verify A B"
        )
    nested = path / "checkpoints"
    steps = folders.step_folders(nested if nested.is_dir() else path)
    if not steps:
        raise ValueError(
            f"{path}: holds no checkpoint; give the folder of a run that has saved one"
        )
    return {f"step {step}": folder for step, folder in steps.items()}


def _compare(path: Path, other: Path, max_header: int) -> bool:
    """Print what differs; whether nothing does."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from mmx.convert.compare import Difference, compare, differing_fields, total_bytes
    from mmx.convert.safetensors_file import Limits
    from mmx.convert.source import open_source

    limits = Limits(header_bytes=max_header)
    one, two = open_source(path, limits=limits), open_source(other, limits=limits)
    fields = differing_fields(one, two)
    for field in fields:
        print(f"config: {field}")
    differences: list[Difference] = []
    tensors, casts = 0, dict[tuple[str, str], int]()
    columns = "comparing", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compare", total=total_bytes(one))
        for step in compare(one, two):
            tensors += 1
            bar.advance(task, step.bytes)
            if step.difference is not None:
                differences.append(step.difference)
            elif len(set(step.dtypes)) > 1:
                casts[step.dtypes] = casts.get(step.dtypes, 0) + 1
    for difference in differences[:SHOWN]:
        gap = "" if difference.largest is None else f", by at most {difference.largest:.3g}"
        print(f"{difference.key}: {difference.what}{gap}")
    if len(differences) > SHOWN:
        print(f"and {len(differences) - SHOWN:,} more tensors differ")
    for (ours, theirs), count in casts.items():
        print(f"{count:,} tensors have equal values as {ours} and as {theirs}")
    if differences or fields:
        print(
            f"different: {len(differences):,} of {tensors:,} tensors, {len(fields)} config fields"
        )
        return False
    print(f"equal: {tensors:,} tensors")
    return True


def _compare_logits(path: Path, other: Path, tokens: int) -> bool:
    """Print the largest difference of the two models' logits; whether there is none."""
    import jax
    import numpy as np

    import mmx

    found = []
    for folder in (path, other):
        config, params = mmx.load(folder)
        if not found and tokens > config.max_seq_len:
            raise ValueError(f"--logits is {tokens}; the model reads {config.max_seq_len} tokens")
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens), np.int32)
        found.append(jax.device_get(mmx.forward(params, ids, config).logits))
        del params
    if found[0].shape != found[1].shape:
        print(f"logits: shapes {found[0].shape} and {found[1].shape}")
        return False
    gap = np.max(np.abs(found[0] - found[1]))
    alike = np.mean(found[0].argmax(-1) == found[1].argmax(-1))
    print(f"logits of {tokens} tokens: largest difference {gap:.3g}, {alike:.1%} alike in the best")
    return bool(gap == 0)
