"""`mmx plot`: draw the curves of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, or of several over one another."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """More runs to draw over it."""
    out: Path | None = None
    """The picture: .png, .pdf or .svg. Of one run it is RUN/plot.png where this is left out."""


def main(arguments: Sequence[str]) -> int:
    """Draw, and print where the picture is."""
    options = tyro.cli(Plot, prog="mmx plot", args=arguments)
    if options.out is None and options.others:
        raise ValueError("several runs have no folder in common; say where to draw with --out FILE")
    from mmx.training.plotting import compare

    out = options.out or options.run / "plot.png"
    try:
        print(compare([options.run, *options.others], out))
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror}") from None
    return 0
