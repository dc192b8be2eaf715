"""What could cost somebody a checkpoint, or pass a broken one for whole: refused, in one line."""

import json
import shutil
import warnings
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np
import pytest

from mmx import integrity
from mmx.cli import main
from mmx.convert import stream, workplace
from mmx.convert.memory import Budget
from mmx.convert.plan import Options, make_plan
from mmx.convert.source import open_source, row_ranges

FIELDS = checkpoints.released_fields()


def write(folder, more=None, **changes) -> Path:
    fields = FIELDS | changes
    tensors = checkpoints.random_tensors(checkpoints.shapes(FIELDS)) | (more or {})
    return checkpoints.write_folder(folder, fields, tensors)


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("mmx: error: ")
    return err


# ---------------------------------------------------------------- what is removed


@pytest.mark.parametrize("suffix", [workplace.CONVERTING, workplace.REPLACED])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_source_whose_name_is_used_on_the_way_stays(tmp_path, capsys, suffix, more):
    source = write(tmp_path / f"it{suffix}")
    before = contents(source)
    assert "lies in" in refused(capsys, "convert", source, tmp_path / "it", "--to", "orbax", *more)
    assert contents(source) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("suffix", [workplace.CONVERTING, workplace.REPLACED])
def test_files_of_others_under_those_names_stay(tmp_path, capsys, suffix, more):
    source = write(tmp_path / "source")
    other = tmp_path / f"it{suffix}"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(capsys, "convert", source, tmp_path / "it", "--to", "orbax", *more)
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_appears_under_the_name_meanwhile_stays(tmp_path, capsys, monkeypatch):
    source, target = write(tmp_path / "source"), tmp_path / "it"
    execute = stream.execute

    def slow(*args):
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        return execute(*args)

    monkeypatch.setattr(stream, "execute", slow)
    assert "not empty" in refused(capsys, "convert", source, target, "--to", "orbax")
    assert (target / "thesis.txt").read_text() == "mine"
    # Nothing of the work is lost.
    (target / "thesis.txt").unlink()
    assert main(["convert", str(source), str(target), "--to", "orbax", "--resume"]) == 0
    integrity.verify(target)


def test_a_mounted_disk_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    source, target = write(tmp_path / "source"), tmp_path / "disk"
    target.mkdir()
    monkeypatch.setattr(workplace.os.path, "ismount", lambda path: Path(path) == target)
    assert "a folder inside it" in refused(capsys, "convert", source, target, "--to", "orbax")


# ---------------------------------------------------------------- what is called whole


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_output_is_not_published_by_resuming(tmp_path, capsys, monkeypatch):
    source, target = write(tmp_path / "source"), tmp_path / "it"
    execute = stream.execute

    def damaged(plan, work, *args):
        written = execute(plan, work, *args)
        flip(work.folder / "model.safetensors")
        return written

    command = ["convert", source, target, "--to", "hf-released", "--verify"]
    with monkeypatch.context() as patched:
        patched.setattr(stream, "execute", damaged)
        refused(capsys, *command, "full")
    assert "model.safetensors" in refused(capsys, *command, "none", "--resume")
    assert not target.exists()


def test_an_output_that_lost_a_file_is_not_whole_already(tmp_path, capsys):
    source, target = write(tmp_path / "source"), tmp_path / "it"
    command = ["convert", str(source), str(target), "--to", "hf-released"]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    assert "whole already" in capsys.readouterr().out
    (target / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(capsys, *command, "--resume")


@pytest.mark.parametrize("form", ["orbax", "hf-released"])
def test_damage_in_a_source_is_not_given_new_digests(tmp_path, capsys, form):
    middle = tmp_path / "middle"
    assert main(["convert", str(write(tmp_path / "source")), str(middle), "--to", form]) == 0
    shard = "params/embed.embedding/0.0" if form == "orbax" else "model.safetensors"
    flip(middle / shard)
    assert shard in refused(capsys, "convert", middle, tmp_path / "it", "--to", "hf")
    assert not (tmp_path / "it").exists()


# ---------------------------------------------------------------- what would not end


def test_casts_of_some_layers_are_counted(tmp_path, monkeypatch):
    """Half of the layers in bf16 make chunks of two costs: the budget must hold the larger."""
    tensors = checkpoints.random_tensors(checkpoints.shapes(FIELDS))
    for key in tensors:
        if key.startswith(("model.layers.2.", "model.layers.3.")) and "gate.weight" not in key:
            tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
    source = checkpoints.write_folder(tmp_path / "source", FIELDS, tensors)
    monkeypatch.setattr("mmx.convert.plan.WHOLE", 0)
    plan = make_plan(open_source(source), Options("orbax"))
    most = stream.largest_piece(plan)
    for name, layout in plan.trees["params"].items():
        for index in layout.chunks():
            piece = stream.chunk_piece(plan, "params", name, layout.region(index))
            assert piece.memory <= most
    with pytest.raises(AssertionError):
        Budget(most).take(most + 1)


def test_empty_tensors_have_few_rows():
    assert list(row_ranges((1 << 59, 0), 1)) == [slice(0, 1 << 59)]


def test_a_config_of_any_number_of_experts_is_refused(tmp_path, capsys):
    source = write(tmp_path / "source", num_local_experts=2_000_000_000)
    for path in source.glob("*.safetensors"):
        tensors = checkpoints.read_file(path)
        kept = {k: v for k, v in tensors.items() if "moe" not in k}
        checkpoints.write_file(path, kept)
    assert "correct config.json" in refused(capsys, "inspect", source)


# ---------------------------------------------------------------- what is not what it seems


def test_only_decay_tables_of_this_model_are_carried(tmp_path, capsys):
    slopes = np.zeros((6, 1, 1), np.float32)
    for layer in (1, 99):  # softmax, and none
        name = f"model.layers.{layer}.self_attn.slope_rate"
        source = write(tmp_path / str(layer), {name: slopes})
        assert name in refused(capsys, "convert", source, tmp_path / "it", "--to", "hf")
    name = "model.layers.0.self_attn.slope_rate"
    for shape in [(5, 1, 1), (0, 1, 1)]:
        source = write(tmp_path / str(shape), {name: np.zeros(shape, np.float32)})
        assert name in refused(capsys, "convert", source, tmp_path / "it", "--to", "hf")
    assert main(["inspect", str(write(tmp_path / "good", {name: slopes}))]) == 0


def test_too_many_files_are_refused_beforehand(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "source")
    monkeypatch.setattr("mmx.convert.plan.MAX_SHARDS", 20)
    command = ["convert", source, tmp_path / "it", "--to", "hf-released", "--shard-size", "1"]
    assert "--shard-size: makes" in refused(capsys, *command)
    assert not (tmp_path / f"it{workplace.CONVERTING}").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(about=[1]),
        lambda m: m.update(step=float("inf")),
        lambda m: next(iter(m["tensors"].values())).update(chunks=[["stranger", 0, 1]]),
    ],
)
def test_manifests_that_agree_with_themselves_alone(tmp_path, capsys, change):
    folder = tmp_path / "it"
    source = write(tmp_path / "source")
    assert main(["convert", str(source), str(folder), "--to", "hf-released"]) == 0
    path = folder / integrity.MANIFEST
    manifest = json.loads(path.read_text())["manifest"]
    change(manifest)
    path.write_bytes(integrity._encode(manifest))
    assert "not a manifest" in refused(capsys, "verify", folder)
    command = ["convert", source, folder, "--to", "hf-released", "--resume"]
    refused(capsys, *command)


def test_a_dangling_tokenizer_is_not_left_out_in_silence(tmp_path, capsys):
    source = write(tmp_path / "source")
    (source / "tokenizer.json").symlink_to("nowhere")
    assert "tokenizer.json" in refused(capsys, "convert", source, tmp_path / "it", "--to", "orbax")


def test_notes_cannot_move_the_cursor(tmp_path, capsys):
    source = write(tmp_path / "source", **{"evil\n\x1b[31mline": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["inspect", str(source)]) == 0
    err = capsys.readouterr().err
    assert "evil" in err
    assert all(line.isprintable() for line in err.splitlines())
    shutil.rmtree(source)
