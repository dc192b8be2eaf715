"""`mmx inspect`: what a checkpoint is, from its headers alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mmx import integrity
from mmx.convert.memory import parse_size
from mmx.convert.safetensors_file import Limits
from mmx.convert.source import ALLOWED, Source, open_source
from mmx.model import count_params

LARGEST = 5  # tensors that are listed
FORMS = {
    "hf": "Hugging Face, transformers' schema",
    "hf-released": "Hugging Face, the released schema",
    "orbax": "Orbax, converted",
    "run": "a training run",
}


@dataclass(frozen=True)
class Inspect:
    """What a checkpoint is, and whether it is complete; no tensor's data are read."""

    path: tyro.conf.Positional[Path]
    """A checkpoint of Hugging Face, one converted to Orbax, or the folder of a run."""
    max_header: str = "8MiB"
    """What the header of a safetensors file may have."""


def main(arguments: Sequence[str]) -> int:
    """Print the table; the exit code is 1 where the checkpoint is not complete."""
    options = tyro.cli(Inspect, prog="mmx inspect", args=arguments)
    any_key = ("*",)
    limits = Limits(header_bytes=parse_size(options.max_header, "--max-header"))
    source = open_source(
        options.path, allow_missing=any_key, allow_extra=any_key, read_data=False, limits=limits
    )
    faults = list(_faults(source))
    table = Table(show_header=False, title=str(options.path))
    for name, text in (*_model_rows(source), *_tensor_rows(source)):
        table.add_row(name, text)
    table.add_row("complete", "no" if faults else "yes, as far as headers and sizes say")
    console = Console()
    console.print(table)
    for fault in faults:
        console.print(fault, soft_wrap=True, markup=False, highlight=False)
    return 1 if faults else 0


def _model_rows(source: Source) -> Iterator[tuple[str, str]]:
    config = source.config
    total, active = count_params(config)
    fused = f", {source.layout} experts" if source.form.startswith("hf") else ""
    vision = " (the text model of a MiniMax-VL-01)" if source.prefix else ""
    yield "form", FORMS[source.form] + fused
    lightning = config.layer_kinds.count("lightning")
    softmax = config.num_layers - lightning
    yield "layers", f"{config.num_layers}: {lightning} lightning, {softmax} softmax{vision}"
    yield "width", f"{config.embed_dim}, vocabulary {config.vocab_size:,}"
    yield "experts", f"{config.num_experts} x {config.expert_dim}"
    yield "parameters", f"{total:,} ({total / 1e9:.2f} B, {active / 1e9:.2f} B active)"


def _tensor_rows(source: Source) -> Iterator[tuple[str, str]]:
    """How many elements of which dtypes, the largest tensors, and the files."""
    elements, sizes = Counter[str](), Counter[str]()
    for entry in source.entries.values():
        dtype = source.dtype(entry)
        count = 1
        for length in entry.matrix:
            count *= length
        elements[dtype.name] += count
        # A fused tensor has many entries, an Orbax array one for each layer.
        sizes[entry.key if source.form.startswith("hf") else entry.path] += count * dtype.itemsize
    for name, count in elements.most_common():
        yield f"  in {name}", f"{count:,}"
    if source.carried:
        size = sum(stored.nbytes for stored in source.carried.values())
        yield "carried along", f"{len(source.carried):,} tensors, {decimal(size)}"
    yield "tensors", f"{len(sizes):,}, {decimal(sum(sizes.values()))}"
    for number, (name, size) in enumerate(sizes.most_common(LARGEST)):
        yield "" if number else "  largest", f"{name}, {decimal(size)}"
    shards = [file for file in source.files if file.suffix == ".safetensors"]
    if shards:
        size = sum(file.stat().st_size for file in shards)
        yield "shards", f"{len(shards):,}, {decimal(size)}"


def _faults(source: Source) -> Iterator[str]:
    if source.missing:
        yield f"missing: {source.missing[0]} ({len(source.missing):,} in all)"
    extra = [key for key, reason in source.dropped.items() if reason == ALLOWED]
    if extra:
        yield f"unexpected: {extra[0]} ({len(extra):,} in all)"
    if (source.folder / integrity.MANIFEST).exists():
        try:
            integrity.check_files(source.folder)
        except integrity.DamagedCheckpoint as error:
            yield str(error)
