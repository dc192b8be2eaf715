"""Commands that run a model where there is too little memory: a table and one line."""

import io
import re
import sys

import jax
import pytest
from random_models import small_config
from talking import write_model

import mmx
from mmx.cli import main
from mmx.cli.models import Loading, partition_of
from mmx.planning import advice
from mmx.planning.exhausted import of_checkpoint

COMMANDS = {
    "generate": ["--prompt", "x", "--max-new-tokens", "100"],
    "chat": ["--max-new-tokens", "8"],
    "serve": ["--port", "0", "--rows", "2"],
}
ERRORS = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte."),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte."),
    MemoryError("std::bad_alloc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("memory") / "model")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["load", "engine", "step"])
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_that_runs_out(command, where, error, folder, monkeypatch, capfd):
    def runs_out(*arguments, **options):
        raise error

    if where == "load":
        monkeypatch.setattr(mmx, "load", runs_out)
    else:
        part = "__init__" if where == "engine" else "step"
        monkeypatch.setattr(f"mmx.inference.engine.Engine.{part}", runs_out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main([command, str(folder), *COMMANDS[command]]) == 2
    out, err = capfd.readouterr()
    assert out.strip() == ""
    *table, last = err.strip().splitlines()
    assert "keys and values" in "".join(table)
    assert re.match(
        r"mmx: error: (a device|this process) has too little memory \(.*\); see the table above",
        last,
    )
    assert str(error) in last


def test_a_setting_that_saves_nothing_is_not_what_to_try(folder, monkeypatch, capfd):
    def runs_out(*arguments, **options):
        raise ERRORS[0]

    monkeypatch.setattr(mmx, "load", runs_out)
    arguments = ["--port", "0", "--pages", "100000", "--page-size", "16"]
    assert main(["serve", str(folder), *arguments]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("see the table above: try --rows 4")


def test_what_is_to_be_tried_is_an_option_of_the_command():
    """Of an engine: other meshes are those that it takes, of as many devices."""
    config = small_config("ls", num_heads=8, num_kv_heads=4)
    partition = partition_of(Loading(mesh="expert=2,seq=2"), config)
    ask = of_checkpoint(
        config, "float32", int8=False, rows=4, tokens=4096, partition=partition
    )  # fmt: skip
    offered = [setting for setting, _ in advice._changes(ask, engine=True)]
    assert [x.split()[0] for x in offered[-4:]] == ["--weights", "--rows", "twice", "--max-seq-len"]
    meshes = [x.removeprefix("--mesh ") for x in offered if x.startswith("--mesh")]
    assert meshes
    for mesh in meshes:
        other = partition_of(Loading(mesh=mesh), config)
        assert other.mesh.size == 4
        assert other.mesh.shape != partition.mesh.shape
    planned = [setting for setting, _ in advice._changes(ask, engine=False)]
    assert any("--rules" in x or "data=" in x for x in planned)
