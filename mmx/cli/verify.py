"""`mmx verify`: check every byte of a run's checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmx import integrity
from mmx.training import folders


@dataclass(frozen=True)
class Verify:
    """Check every byte of a run's checkpoints against the digests they were saved with."""

    run: tyro.conf.Positional[Path]
    """The folder of a run, of its checkpoints, or of one step."""


def main(arguments: Sequence[str]) -> int:
    """Print one line a step; the first damaged file is the error."""
    options = tyro.cli(Verify, prog="mmx verify", args=arguments)
    steps = _steps(options.run)
    damage: list[str] = []
    for step, folder in steps.items():
        try:
            seen = integrity.verify(folder)
        except integrity.DamagedCheckpoint as error:
            damage.append(str(error))
            print(f"step {step}: damaged")
        else:
            print(f"step {step}: whole, {seen.files} files, {seen.bytes:,} bytes", flush=True)
    if damage:
        more = f" (and {len(damage) - 1} more damaged)" if len(damage) > 1 else ""
        raise ValueError(damage[0] + more)
    return 0


def _steps(run: Path) -> dict[str, Path]:
    """Step folders by what to call them."""
    if not run.exists():
        raise ValueError(f"{run}: no such folder")
    if not run.is_dir():
        raise ValueError(f"{run}: not a folder; give the folder of a run")
    if (run / integrity.MANIFEST).exists():
        return {run.name: run}
    nested = run / "checkpoints"
    steps = folders.step_folders(nested if nested.is_dir() else run)
    if not steps:
        raise ValueError(f"{run}: holds no checkpoint; give the folder of a run that has saved one")
    return {str(step): folder for step, folder in steps.items()}
