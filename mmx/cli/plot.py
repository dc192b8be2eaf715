"""`mmx plot`: draw the curves of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Plot:
    """Draw the curves of a run, or of several over one another."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    others: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")
    ] = ()
    """More runs to draw over it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The picture: .png, .pdf or .svg. Of one run it is RUN/plot.png where this is left out."""


def main(arguments: Sequence[str]) -> int:
    """Draw, and print where the picture is."""
    options = tyro.cli(Plot, prog="mmx plot", args=arguments)
    if options.out is None and options.others:
        raise ValueError("several runs have no folder in common; say where to draw with --out FILE")
    from mmx.training.plotting import compare

    out = options.out or options.run / "plot.png"
    print(compare([options.run, *options.others], out))
    return 0
