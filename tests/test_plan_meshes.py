"""`mmx plan` for inference without a mesh, its advice of another one, the table of parameters."""

import json
import re

import pytest

from mmx.cli import main, plan
from mmx.planning.advice import advise
from mmx.planning.report import make_plan

SHORT = "--seq 8192 --quick"


def ask(line):
    return plan.request_of(plan.parse(["minimax-text-01", *f"{line} {SHORT}".split()]))


@pytest.mark.parametrize(
    ("line", "mesh"),
    [
        ("--mode decode --batch 8 --topology h200:8", dict(expert=8)),
        ("--mode decode --topology h200:1", {}),
        # 8 key heads: 16 devices cannot share them by experts alone.
        ("--mode decode --topology h200:8x2", dict(expert=8, tensor=2)),
        ("--mode decode --batch 2 --topology h200:8 --slices 2", dict(data=2, expert=8)),
        ("--mode prefill --batch 1 --topology h200:8", dict(expert=8)),
        ("--mode prefill --batch 2 --topology h200:8x8", dict(fsdp=2, expert=32)),
        ("--mode train --batch 8 --topology h200:8", dict(fsdp=8)),
        ("--mode decode --batch 8 --topology h200:8 --mesh fsdp=8", dict(fsdp=8)),
        ("--mode decode --batch 8 --topology h200:8 --rules tensor", dict(tensor=8)),
    ],
)
def test_inference_has_a_mesh_that_its_rules_split(line, mesh):
    assert {axis: size for axis, size in ask(line).mesh.items() if size > 1} == mesh


def test_advice_tries_the_same_devices_first():
    bad = make_plan(ask("--mode decode --batch 8 --topology h200:8 --mesh fsdp=8"))
    assert not bad.fits
    (first, total, fits), *rest = advise(bad)
    assert (first, fits) == ("--mesh expert=8", True)
    assert (
        total == make_plan(ask("--mode decode --batch 8 --topology h200:8 --mesh expert=8")).total
    )
    assert rest[0][0] == "--mesh expert=4,tensor=2 --rules decode"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_the_table_of_parameters_adds_up(tmp_path, capsys, weights):
    line = f"minimax-text-01 --mode decode --topology h200:8 --weights {weights} {SHORT}"
    found = tmp_path / "plan.json"
    assert main(["plan", *line.split(), "--parameters", "--json", str(found)]) == 0
    written = json.loads(found.read_text())
    rows = {row["name"]: row for row in written["parameters"]}
    assert (
        sum(row["bytes_per_device"] for row in rows.values())
        == (written["memory_bytes"]["parameters"])
    )
    router = rows["blocks/layer_0/moe/router/kernel"]
    assert router["shape"] == [10, 6144, 32]
    assert router["bytes_per_device"] == 10 * 6144 * 32 * 4  # always fp32, whole
    embedding = rows["embed/embedding"]
    assert embedding["spec"] == [["expert"], []]
    lines = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert ["embed/embedding", "200064, 6144", "expert, -", "307.3 MB"] in lines
    assert {line[0] for line in lines} >= rows.keys()
