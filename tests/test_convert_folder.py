"""`mmx convert`: what lies beside the tensors, what may be missing, what is refused."""

import functools
import json
import os
import re

import checkpoints
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conversions import (
    CASES,
    GOLDEN,
    TABLES,
    convert,
    digests,
    load,
    refused,
    small,
    without_tables,
)
from test_load import assert_same, flat

import mmx
from mmx import integrity
from mmx.config import decay_slopes

# ---------------------------------------------------------------- what lies beside the tensors


def test_a_folder_of_hugging_face_is_complete(tmp_path, capsys):
    source = small(tmp_path / "it", auto_map={"AutoConfig": "x.Y"}, pad_token_id=3)
    out = convert(source, tmp_path / "out", "--to", "hf-released", "--shard-size", "2KB")
    assert "auto_map is left out" in capsys.readouterr().err
    fields = checkpoints.read_fields(source)
    del fields["auto_map"]
    assert checkpoints.read_fields(out) == fields
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()).keys() == {
        "bos_token_id",
        "eos_token_id",
    }
    assert "minimax_text_01" in (out / "README.md").read_text()
    assert not list(out.glob("*.py"))
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 5
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / checkpoints.INDEX).read_text())
    tensors = checkpoints.read_folder(out)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for shard in shards:
        inside = checkpoints.read_file(out / shard)
        assert inside.keys() == {k for k, name in index["weight_map"].items() if name == shard}
        assert len(inside) == 1 or sum(array.nbytes for array in inside.values()) <= 2000
    # Without a limit it is one file, and no index.
    whole = convert(out, tmp_path / "whole", "--to", "hf-released")
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    assert (whole / "README.md").read_bytes() == (out / "README.md").read_bytes()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("text")])
def test_decay_tables_are_kept_or_computed(name, tmp_path):
    tensors = checkpoints.read_folder(GOLDEN / name)
    fields = checkpoints.read_fields(GOLDEN / name)
    bare = checkpoints.write_folder(tmp_path / "bare", fields, without_tables(tensors))
    out = checkpoints.read_folder(convert(bare, tmp_path / "out", "--to", "hf"))
    lightning = fields["layer_types"].count("linear_attention")
    made = {key: value for key, value in out.items() if key.endswith(TABLES)}
    assert len(made) == 4 * lightning
    for key, value in made.items():
        assert value.dtype == np.float32
        if key in tensors:
            np.testing.assert_allclose(value, tensors[key], rtol=1e-6, atol=0, err_msg=key)
            assert value.shape == tensors[key].shape


def test_computed_tables_against_the_formula_in_float64(tmp_path):
    """p05 and p06 store none; blocks of 256."""
    name = "text/p06_block256_T700"
    out = checkpoints.read_folder(convert(GOLDEN / name, tmp_path / "out", "--to", "hf"))
    config = mmx.ModelConfig.from_hf(checkpoints.read_fields(GOLDEN / name))
    slopes = decay_slopes(config).astype(np.float64)
    i = np.arange(256)
    for layer, kind in enumerate(config.layer_kinds):
        if kind != "lightning":
            continue
        at = f"model.layers.{layer}.self_attn."
        slope = slopes[layer][:, None]
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-5, atol=1e-30
        )  # fp32 products
        np.testing.assert_array_equal(out[at + "slope_rate"][:, 0, 0], slopes[layer])
        query, key = np.exp(-slope * (i + 1)), np.exp(-slope * (255 - i))
        close(out[at + "query_decay"][:, :, 0], query)
        close(out[at + "key_decay"][:, :, 0], key)
        distance = i[:, None] - i[None, :]
        wanted = np.where(distance >= 0, np.exp(-slope[..., None] * np.maximum(distance, 0)), 0)
        close(out[at + "diagonal_decay"][0], wanted)


def test_the_released_form_has_no_decay_tables(tmp_path, capsys):
    out = convert(GOLDEN / checkpoints.TRANSFORMERS, tmp_path / "out", "--to", "hf-released")
    assert "8 decay tables are dropped" in capsys.readouterr().err
    assert not any(key.endswith(TABLES) for key in checkpoints.read_folder(out))
    fields = checkpoints.read_fields(out)
    assert fields["model_type"] == "minimax_text_01"
    config, params = load(out)
    original = load(GOLDEN / checkpoints.TRANSFORMERS)
    assert config == original[0]
    assert_same(params, original[1])


def test_what_another_reader_will_not_take_is_said(tmp_path, capsys):
    out = convert(GOLDEN / checkpoints.RELEASED, tmp_path / "out", "--to", "hf")
    said = capsys.readouterr().err
    for word in ("slope_base", "slope_layer_epsilon", "rotary_dim"):
        assert f"config.json: {word} = " in said
    assert load(out)[0] == load(GOLDEN / checkpoints.RELEASED)[0]
    assert_same(load(out)[1], load(GOLDEN / checkpoints.RELEASED)[1])


def test_vision_keys_are_carried(tmp_path):
    source = GOLDEN / checkpoints.VISION
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax")
    assert (orbax / "carried").is_dir()
    assert (orbax / "preprocessor_config.json").is_file()
    carried = ocp.StandardCheckpointer().restore(orbax / "carried")
    tensors = checkpoints.read_folder(source)
    vision = {k: v for k, v in tensors.items() if not k.startswith("language_model.")}
    assert len(vision) > 20
    seen = {key.replace("/", "."): value for key, value in flat(carried).items()}
    assert digests(seen) == digests(vision)


def test_vision_has_no_place_in_transformers_class(tmp_path, capsys):
    line = refused(capsys, GOLDEN / checkpoints.VISION, tmp_path / "out", "--to", "hf")
    assert "MiniMax-VL-01" in line
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- missing and extra


def drop(folder, *keys):
    for shard in sorted(folder.glob("*.safetensors")):
        checkpoints.edit_tensors(
            folder, shard.name, lambda tensors: [tensors.pop(key, None) for key in keys]
        )
    index = json.loads((folder / checkpoints.INDEX).read_text())
    for key in keys:
        del index["weight_map"][key]
    (folder / checkpoints.INDEX).write_text(json.dumps(index))


def test_a_missing_key(tmp_path, capsys):
    source = small(tmp_path / "it")
    key = "model.layers.1.self_attn.q_proj.weight"
    drop(source, key)
    line = refused(capsys, source, tmp_path / "out", "--to", "orbax")
    assert f"{key} is missing" in line
    allow = ["--allow-missing", "model.layers.1.self_attn.q*"]
    line = refused(capsys, source, tmp_path / "out", "--to", "orbax", *allow)
    assert "1 of 2 parts of blocks/layer_1/attention/q_proj are missing" in line
    out = convert(source, tmp_path / "out", "--to", "hf-released", *allow)
    assert f"{key}: missing, and left out" in capsys.readouterr().err
    wanted = digests(checkpoints.read_folder(source))
    assert digests(checkpoints.read_folder(out)) == wanted
    other = "model.layers.3.self_attn.q_proj.weight"
    drop(source, other)
    allow = ["--allow-missing", key, "--allow-missing", other]
    orbax = convert(source, tmp_path / "orbax", "--to", "orbax", *allow)
    restored = flat(ocp.StandardCheckpointer().restore(orbax / "params"))
    assert "blocks/layer_1/attention/q_proj" not in restored
    assert "blocks/layer_1/attention/k_proj" in restored
    with pytest.raises(ValueError, match="blocks/layer_1/attention/q_proj is missing"):
        mmx.load(orbax)
    back = convert(orbax, tmp_path / "back", "--to", "hf-released", "--allow-missing", "*/q_proj")
    del wanted[other]
    assert digests(checkpoints.read_folder(back)) == wanted


def test_one_missing_expert_cannot_be_fused(tmp_path, capsys):
    source = small(tmp_path / "it")
    key = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    drop(source, key)
    options = ["--to", "hf", "--experts", "fused", "--allow-missing", key]
    line = refused(capsys, source, tmp_path / "out", *options)
    assert "parts of model.layers.2.mlp.experts.gate_up_proj are missing" in line


def test_an_extra_key(tmp_path, capsys):
    source = small(tmp_path / "it")
    extra = {"extra.weight": np.ones(3, np.float32)}
    name = "model-00002-of-00003.safetensors"
    checkpoints.edit_tensors(source, name, lambda tensors: tensors.update(extra))
    checkpoints.edit_index(source, **{"extra.weight": name})
    line = refused(capsys, source, tmp_path / "out", "--to", "hf-released")
    assert "extra.weight is unexpected" in line
    options = ["--to", "hf-released", "--allow-extra", "extra.*"]
    out = convert(source, tmp_path / "out", *options)
    assert "extra.weight: dropped" in capsys.readouterr().err
    wanted = checkpoints.read_folder(source)
    del wanted["extra.weight"]
    assert digests(checkpoints.read_folder(out)) == digests(wanted)


# ---------------------------------------------------------------- what is refused


def test_destinations(tmp_path, capsys):
    source = small(tmp_path / "it")
    to = ["--to", "hf-released"]
    assert "lies in" in refused(capsys, source, source, *to)
    assert "lies in" in refused(capsys, source, source / "out", *to)
    assert "lies in" in refused(capsys, source, tmp_path, *to)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    assert "not empty" in refused(capsys, source, other, *to)
    assert "holds no checkpoint" in refused(capsys, source, other, *to, "--overwrite")
    assert sorted(os.listdir(other)) == ["letter.txt"]
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is no folder" in refused(capsys, source, file, *to, "--overwrite")
    out = convert(source, tmp_path / "out", *to)
    assert "not empty" in refused(capsys, source, out, *to)
    empty = tmp_path / "empty"
    empty.mkdir()
    convert(source, empty, *to)
    # A checkpoint is replaced, once the new one is whole.
    (out / "stale.txt").write_text("")
    checkpoints.edit_fields(source, rms_norm_eps=1e-4)
    convert(source, out, *to, "--overwrite")
    assert checkpoints.read_fields(out)["rms_norm_eps"] == 1e-4
    assert not (out / "stale.txt").exists()
    assert not list(tmp_path.glob("*.replaced"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-ram", "many"], "--max-ram many: is no size"),
        (["--max-ram", "300MB"], "is too little"),
        (["--shard-size", "0"], "--shard-size 0: is no size"),
        (["--workers", "0"], "must be at least 1"),
        (["--experts", "fused"], "--experts fused"),
    ],
)
def test_options(options, words, tmp_path, capsys):
    source = small(tmp_path / "it")
    line = refused(capsys, source, tmp_path / "out", "--to", "hf-released", *options)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_none(tmp_path, capsys):
    line = refused(capsys, tmp_path / "nothing", tmp_path / "out", "--to", "orbax")
    assert "no such folder" in line
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, tmp_path / "empty", tmp_path / "out", "--to", "orbax")


def test_an_orbax_folder_that_is_not_whole_is_no_source(tmp_path, capsys):
    orbax = convert(small(tmp_path / "it"), tmp_path / "orbax", "--to", "orbax")
    chunk = next(orbax.glob("params/*gate_proj/0*"))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    assert chunk.name in refused(capsys, orbax, tmp_path / "back", "--to", "hf")
    with pytest.raises(ValueError, match=re.escape(chunk.name)):
        mmx.load(orbax)
    chunk.write_bytes(content)
    (orbax / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capsys, orbax, tmp_path / "back", "--to", "hf")
    (orbax / integrity.MANIFEST).unlink()
    assert integrity.MANIFEST in refused(capsys, orbax, tmp_path / "back", "--to", "hf")
