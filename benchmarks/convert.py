"""Conversion beside copying the same files: speed, and memory that does not grow.

    python benchmarks/convert.py [--json FILE] [--folder DIR] [--sizes 1,5,20] [--max-ram 3GiB]

For each size in GB a checkpoint in the released layout is made of random bf16, as wide as
`bench-4b` and as deep as the size asks for. Then, each to its end on the disk (fsync) and each
beginning with no page of its input in memory:

    copy      the safetensors files, read and written 16 MiB at a time
    orbax     mmx convert --to orbax --verify none
    hf        the Orbax folder back, mmx convert --to hf-released --verify none
    verify    mmx verify of the Orbax folder

`of_copy` is the speed over that of the copy; `peak_MB` the most memory the process held. Takes
three times the largest size in disk space.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # isort: skip

import mmx
from benchmarks.measure import Report
from mmx.config import ModelConfig
from mmx.convert import mapping
from mmx.convert.checkpoint import INDEX
from mmx.convert.safetensors_writer import ShardWriter, aligned_order

SHARD = 2_200_000_000  # bytes, the mean of the released checkpoint
BLOCK = 16 << 20


def make_config(size: float) -> ModelConfig:
    """Of about so many bytes in bf16: as wide as 'bench-4b', as deep as it takes."""
    base = dataclasses.replace(mmx.preset("bench-4b"), layer_kinds=("lightning", "softmax"))
    one, _ = mmx.count_params(base)
    two, _ = mmx.count_params(dataclasses.replace(base, layer_kinds=base.layer_kinds * 2))
    blocks = max(1, round((size / 2 - one) / (two - one)) + 1)
    return dataclasses.replace(base, layer_kinds=base.layer_kinds * blocks)


def make_checkpoint(folder: Path, config: ModelConfig) -> int:
    """Write it a tensor at a time; the bytes of its tensors."""
    folder.mkdir(parents=True)
    fields = config.to_hf("minimax_text_01")
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = {e.key: e.key_shape for e in mapping.entries(config, "separate")}
    dtypes = {k: "F32" if k.endswith("moe.gate.weight") else "BF16" for k in shapes}
    shards: list[list[str]] = [[]]
    room = SHARD
    for key, shape in shapes.items():
        size = int(np.prod(shape)) * (4 if dtypes[key] == "F32" else 2)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(key)
        room -= size
    rng, total, weight_map = np.random.default_rng(0), 0, {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        order = aligned_order({k: (dtypes[k], shapes[k]) for k in keys})
        writer = ShardWriter(folder / name, {k: (dtypes[k], shapes[k]) for k in order})
        for key in order:
            items = int(np.prod(shapes[key]))
            kind = np.uint32 if dtypes[key] == "F32" else np.uint16
            # Random mantissas under one exponent: numbers near 1 that do not compress.
            high = 0x3F800000 if kind == np.uint32 else 0x3F80
            low = rng.integers(0, 1 << 7, items, kind)
            data = (low | kind(high)).astype(kind)
            writer.write(data.view(np.uint8))
            total += data.nbytes
            weight_map[key] = name
        writer.close()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Write what is still in memory of these files, and drop their pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", 0) as write:
            while block := read.read(BLOCK):
                write.write(block)
            os.fsync(write.fileno())


# The peak of the process itself: what `wait` reports begins with that of whoever started it.
RUN = """
import re, sys
from mmx.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def timed(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MB of a command of its own."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"mmx {' '.join(arguments)}: ended with {done.returncode}")
    return seconds, int(done.stdout.split()[-1]) * 1024 / 1e6


def measure(report: Report, folder: Path, size: float, max_ram: str, workers: str | None) -> None:
    source, copied = folder / "source", folder / "copied"
    orbax, back = folder / "orbax", folder / "back"
    more = ["--max-ram", max_ram, "--verify", "none", *(["--workers", workers] if workers else [])]
    total = make_checkpoint(source, make_config(size * 1e9))
    gigabytes = total / 1e9

    forget(source)
    start = time.perf_counter()
    copy(source, copied)
    rate = gigabytes / (time.perf_counter() - start)
    report.add(GB=gigabytes, part="copy", GBps=rate)
    shutil.rmtree(copied)

    commands = {
        "orbax": (source, ["convert", source, orbax, "--to", "orbax", *more]),
        "hf": (orbax, ["convert", orbax, back, "--to", "hf-released", *more]),
        "verify": (orbax, ["verify", orbax]),
    }
    for part, (read, command) in commands.items():
        forget(read)
        seconds, peak = timed(*map(str, command))
        speed = gigabytes / seconds
        report.add(GB=gigabytes, part=part, GBps=speed, of_copy=speed / rate, peak_MB=peak)
        if part == "hf":
            shutil.rmtree(back)
    for left in (source, orbax):
        shutil.rmtree(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--folder", help="where there is room; a temporary folder when not given")
    parser.add_argument("--sizes", default="1,5,20", help="GB, comma between")
    parser.add_argument("--max-ram", default="3GiB")
    parser.add_argument("--workers")
    options = parser.parse_args()
    report = Report(float("inf"), options.json)
    report.about["cores"] = os.cpu_count()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for size in map(float, options.sizes.split(",")):
            measure(report, Path(folder) / f"{size:g}", size, options.max_ram, options.workers)
    report.table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
