"""The largest malformed files: refused at once, in little memory, each in a process of its own."""

import json
import os
import subprocess
import sys

import checkpoints
from malformed import BOMBS

SECONDS = 2
MEGABYTES = 256

MEASURE = """
import json, os, sys, time
from pathlib import Path
from mmx.convert.checkpoint import SafetensorsFolder, read_json
from mmx.convert.safetensors_file import Limits

def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

name, folder = sys.argv[1], Path(sys.argv[2])
limits = Limits(header_bytes=64 << 20) if name.endswith("limit raised") else Limits()
before, start = megabytes("VmRSS"), time.process_time()
try:
    read_json(folder, "config.json")
    SafetensorsFolder(folder, limits)
except ValueError as error:
    said = str(error)
seconds = time.process_time() - start
print(json.dumps([said, seconds, megabytes("VmHWM") - before]))
"""


def test_the_largest_are_refused_in_little_memory(tmp_path):
    """Each in a process of its own: the peak of one would hide that of the next."""
    for number, (name, (write, named)) in enumerate(BOMBS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write(folder)
        command = [sys.executable, "-c", MEASURE, name, str(folder)]
        paths = os.pathsep.join(["tests", "."])
        done = subprocess.run(
            command, cwd=checkpoints.GOLDEN.parents[1], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (name, done.stderr)
        said, seconds, megabytes = json.loads(done.stdout)
        assert seconds < SECONDS, (name, seconds)
        assert megabytes < MEGABYTES, (name, megabytes)
        assert str(folder) in said
        assert said.isprintable()
        assert all(word in said for word in named), (name, said)
        for file in folder.iterdir():
            file.unlink()  # some have 60 MB
