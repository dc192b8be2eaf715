"""`mmx data`: build token shards from text, and check them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mmx.cli.lists import gather_repeated

ACTIONS = ("build", "verify")


@dataclass(frozen=True)
class Build:
    """Text to token shards. Run again to finish or renew a folder: what is done is kept."""

    out: Path
    """The corpus folder."""
    input: tuple[str, ...] = ()
    """Files or folders of jsonl, parquet or text, each PATH or NAME=PATH, together or each after an
    --input of its own; none: the standard library of this Python and generated text."""
    tokenizer: Path | None = None
    """A tokenizer.json; without one, one is trained."""
    vocab_size: int = 8192
    """Of the trained tokenizer."""
    end_token: str | None = None
    """The token that ends a document; found by its usual names."""
    heldout: float = 0.05
    """Fraction of documents held out, by hash."""
    text_field: str = "text"
    """Field or column of the text."""
    on_bad: Literal["error", "skip"] = "error"
    """At binary or malformed documents."""
    part_mib: int = 32
    """Text a shard, about."""
    workers: int = os.cpu_count() or 1
    """Processes; the result does not depend on them."""


@dataclass(frozen=True)
class Verify:
    """Compare every file of a corpus with the SHA-256 in its manifest."""

    folder: tyro.conf.Positional[Path]
    """The corpus folder."""


def main(arguments: Sequence[str]) -> int:
    """Build or verify; print what is there."""
    action, *rest = arguments or [""]
    if action in ("-h", "--help"):
        print("usage: mmx data {build,verify} [OPTIONS]\n\nText to token shards, and their check.")
        return 0
    if action not in ACTIONS:
        raise ValueError(f"mmx data {action}: choose one of {', '.join(ACTIONS)}")
    if action == "verify":
        options = tyro.cli(Verify, prog="mmx data verify", args=rest)
        from mmx.data.shards import Manifest

        manifest = Manifest.load(options.folder)
        manifest.verify()
    else:
        arguments = gather_repeated(Build, rest)
        manifest = _build(tyro.cli(Build, prog="mmx data build", args=arguments))
    _show(manifest)
    return 0


def _build(options: Build):
    from rich.console import Console
    from rich.progress import Progress

    from mmx.data.corpus import Recipe, build_corpus

    recipe = Recipe(
        inputs=options.input,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        end_token=options.end_token,
        heldout=options.heldout,
        text_field=options.text_field,
        on_bad=options.on_bad,
        part_bytes=options.part_mib << 20,
    )
    try:
        console = Console(stderr=True)
        # Where nobody watches, rich would still end with an empty line.
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("tokenizer", total=None)

            def report(done: int, total: int) -> None:
                progress.update(task, description="shards", completed=done, total=total)

            return build_corpus(recipe, options.out, workers=options.workers, progress=report)
    except OSError as error:
        where = Path(error.filename or options.out)
        ours = where.is_relative_to(options.out) or options.out.is_relative_to(where)
        remedy = "choose another --out" if ours else "make it readable, or leave it out"
        raise ValueError(f"{where}: {error.strerror}; {remedy}") from None


def _show(manifest) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmx.data.shards import SPLITS

    table = Table(title=str(manifest.folder))
    table.add_column("source")
    for split in SPLITS:
        table.add_column(f"{split} documents", justify="right")
        table.add_column("tokens", justify="right")
    for source in manifest.sources:
        row = []
        for split in SPLITS:
            documents = sum(s.documents for s in manifest.splits[split] if s.source == source)
            row += [f"{documents:,}", f"{manifest.tokens(split)[source]:,}"]
        table.add_row(source, *row)
    Console().print(table)
    skipped = ", ".join(f"{n:,} {why}" for why, n in manifest.skipped.items() if n)
    print(f"vocabulary {manifest.vocab_size:,}; left out: {skipped or 'nothing'}")
