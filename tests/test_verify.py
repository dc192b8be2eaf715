"""`mmx verify` and `mmx inspect` of converted checkpoints: every damage found, every difference."""

import random
import re
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest

from mmx import integrity
from mmx.cli import main
from mmx.convert.compare import compare
from mmx.convert.source import open_source

FLIPS = 1000
SWAPS = {"orbax": 17, "hf": 83}  # so many pairs of arrays of one shape has the former
FIELDS = checkpoints.released_fields()


def convert(source, target, *options) -> Path:
    assert main(["convert", str(source), str(target), "--verify", "none", *options]) == 0
    return Path(target)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint of random tensors in two shards."""
    folder = tmp_path_factory.mktemp("original") / "it"
    tensors = checkpoints.random_tensors(checkpoints.shapes(FIELDS))
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    return checkpoints.write_folder(folder, FIELDS, tensors, names)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    """The same in each form that convert writes."""
    folder = tmp_path_factory.mktemp("converted")
    return {
        "orbax": convert(original, folder / "orbax", "--to", "orbax"),
        "hf": convert(original, folder / "hf", "--to", "hf", "--shard-size", "6KB"),
        "fused": convert(original, folder / "fused", "--to", "hf", "--experts", "fused"),
        "hf-released": convert(original, folder / "released", "--to", "hf-released"),
    }


def found(folder) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(integrity.DamagedCheckpoint) as caught:
        integrity.verify(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- against the manifest


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_every_flipped_bit_is_found_by_name(converted, tmp_path, form):
    folder = Path(shutil.copytree(converted[form], tmp_path / "it"))
    tensors = integrity.read_manifest(folder).tensors
    holders: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        for file, begin, end in tensor.chunks:
            holders.setdefault(file, []).append((begin, end, name))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(form)
    named = 0
    for path in draw.choices(files, sizes, k=FLIPS // 2):
        content = path.read_bytes()
        place = draw.randrange(8 * len(content))
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        message = found(folder)
        assert message.startswith(str(path)), message
        inside = holders.get(path.relative_to(folder).as_posix(), [])
        for begin, end, name in inside:
            if begin <= place // 8 < end:
                assert f"(tensor {name})" in message
                named += 1
        path.write_bytes(content)
    assert named > FLIPS // 8, "few of the flips were in tensors"
    integrity.verify(folder)


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_swapped_tensors_of_one_shape_are_found(converted, original, tmp_path, form):
    folder = Path(shutil.copytree(converted[form], tmp_path / "it"))
    tensors = integrity.read_manifest(folder).tensors
    alike: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        # Norms are compared too: their values are random here.
        if not re.search("slope_rate|_decay$", name):
            alike.setdefault((tensor.shape, tensor.dtype, len(tensor.chunks)), []).append(name)
    pairs = [(a, b) for names in alike.values() for a in names for b in names if a < b]
    for one, other in random.Random(0).sample(pairs, SWAPS[form]):
        places = [tensors[one].chunks, tensors[other].chunks]
        before = {file: (folder / file).read_bytes() for p in places for file, _, _ in p}
        _swap(folder, *places)
        message = found(folder)
        assert one in message or other in message, message
        # Without the manifest, beside the original.
        (folder / integrity.MANIFEST).rename(tmp_path / "manifest")
        if form == "hf":
            source, whole = open_source(folder), open_source(original)
            differ = [s.difference.key for s in compare(whole, source) if s.difference]
            assert sorted(differ) == sorted([one, other])
        (tmp_path / "manifest").rename(folder / integrity.MANIFEST)
        for file, content in before.items():
            (folder / file).write_bytes(content)


def _swap(folder, ours, theirs) -> None:
    """Exchange the bytes of two tensors."""
    for (file, begin, end), (other, first, last) in zip(ours, theirs, strict=True):
        contents = {name: bytearray((folder / name).read_bytes()) for name in (file, other)}
        ours_bytes, theirs_bytes = contents[file][begin:end], contents[other][first:last]
        contents[file][begin:end] = theirs_bytes
        contents[other][first:last] = ours_bytes
        for name, content in contents.items():
            (folder / name).write_bytes(content)


def test_verify_says_what_it_read_and_what_is_damaged(converted, tmp_path, capsys):
    assert main(["verify", str(converted["orbax"])]) == 0
    assert re.fullmatch(r"orbax: whole, \d+ files, [\d,]+ bytes\n", capsys.readouterr().out)
    folder = Path(shutil.copytree(converted["hf"], tmp_path / "it"))
    (folder / "config.json").unlink()
    assert main(["verify", str(folder)]) == 2
    assert "config.json: missing" in capsys.readouterr().err


def test_a_folder_without_a_manifest_is_not_called_whole(original, capsys):
    assert main(["verify", str(original)]) == 2
    assert "no MANIFEST.json" in capsys.readouterr().err


# ---------------------------------------------------------------- of two


def test_all_forms_of_one_checkpoint_are_equal(original, converted, capsys):
    count = len(checkpoints.shapes(FIELDS))
    for form, folder in converted.items():
        code = main(["verify", str(original), str(folder)])
        assert (code, capsys.readouterr().out) == (0, f"equal: {count} tensors\n"), form


def _edited(original, tmp_path, edit) -> Path:
    folder = Path(shutil.copytree(original, tmp_path / "edited"))
    for shard in folder.glob("*.safetensors"):
        checkpoints.edit_tensors(folder, shard.name, edit)
    return folder


def test_one_element_is_found_and_measured(original, converted, tmp_path, capsys):
    key = "model.layers.2.block_sparse_moe.experts.1.w3.weight"

    def edit(tensors):
        if key in tensors:
            tensors[key] = tensors[key].copy()
            tensors[key][3, 2] += np.float32(0.25)

    folder = _edited(original, tmp_path, edit)
    for other in (original, converted["fused"], converted["orbax"]):
        assert main(["verify", str(other), str(folder)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{key}: 1 of 70 elements differ, by at most 0.25"
        assert lines[1].startswith("different: 1 of ")


def test_bits_are_compared_and_not_values(original, tmp_path, capsys):
    """0 and -0 are equal numbers, and a NaN is not equal to itself."""
    key = "model.norm.weight"

    def with_value(value):
        def edit(tensors):
            if key in tensors:
                tensors[key] = np.full_like(tensors[key], value)

        return edit

    folders = [
        _edited(original, tmp_path / name, with_value(value))
        for name, value in (("zero", 0.0), ("minus", -0.0), ("nan", np.nan))
    ]
    zero, minus, nan = map(str, folders)
    assert main(["verify", zero, minus]) == 1
    assert f"{key}: 10 of 10 elements differ, by at most 0\n" in capsys.readouterr().out
    assert main(["verify", nan, nan]) == 0
    assert main(["verify", zero, nan]) == 1
    assert "by at most inf" in capsys.readouterr().out


def test_a_dtype_alone_is_no_difference(original, tmp_path, capsys):
    low = convert(original, tmp_path / "low", "--to", "hf-released", "--dtype", "bf16")
    high = convert(low, tmp_path / "high", "--to", "orbax", "--dtype", "fp32")
    capsys.readouterr()
    assert main(["verify", str(low), str(high)]) == 0
    assert "tensors have equal values as bfloat16 and as float32" in capsys.readouterr().out
    assert main(["verify", str(original), str(low)]) == 1
    # Rounding to 8 bits of mantissa: half a unit in the last place of numbers up to about 4.
    gaps = re.findall(r"by at most (\S+)", capsys.readouterr().out)
    assert gaps
    assert all(0 < float(gap) <= 2**-7 for gap in gaps)


def test_other_models_and_missing_parts(original, tmp_path, capsys):
    fewer = FIELDS | {"num_hidden_layers": 2, "attn_type_list": [0, 1], "rope_theta": 500.0}
    tensors = checkpoints.random_tensors(checkpoints.shapes(fewer))
    folder = checkpoints.write_folder(tmp_path / "small", fewer, tensors)
    assert main(["verify", str(original), str(folder)]) == 1
    out = capsys.readouterr().out
    assert "config: rope_theta: 10000.0 and 500.0\n" in out
    assert f"only in {original}" in out


def test_logits_of_both(original, converted, capsys):
    assert main(["verify", str(original), str(converted["orbax"]), "--logits", "12"]) == 0
    assert "logits of 12 tokens: largest difference 0," in capsys.readouterr().out
    assert main(["verify", str(original), "--logits", "12"]) == 2
    assert main(["verify", str(original), str(converted["hf"]), "--logits", "1000"]) == 2
    assert "the model reads 64 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------- inspect


def test_inspect_tells_what_is_there(original, converted, capsys, monkeypatch):
    from mmx.convert import safetensors_file

    def no_data(*args, **kwargs):
        raise AssertionError("tensor data were read")

    monkeypatch.setattr(safetensors_file, "read_part", no_data)
    for folder, form in [(original, "released"), (converted["fused"], "fused"),
                         (converted["orbax"], "Orbax")]:  # fmt: skip
        assert main(["inspect", str(folder)]) == 0
        out = capsys.readouterr().out
        total = sum(map(checkpoints.size, checkpoints.shapes(FIELDS).values()))
        assert f"{total:,}" in out
        assert "2 lightning, 2 softmax" in out
        assert form in out


def test_inspect_of_what_is_not_whole(original, converted, tmp_path, capsys):
    folder = tmp_path / "it"
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors = checkpoints.random_tensors(checkpoints.shapes(FIELDS))
    del tensors[key]
    checkpoints.write_folder(folder, FIELDS, tensors | {"stranger": np.zeros(3, np.float32)})
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"missing: {key} (1 in all)" in out
    assert "unexpected: stranger (1 in all)" in out
    cut = Path(shutil.copytree(converted["orbax"], tmp_path / "cut"))
    victim = next(path for path in sorted(cut.rglob("*")) if path.name == "0.0")
    victim.unlink()
    assert main(["inspect", str(cut)]) in (1, 2)
    captured = capsys.readouterr()
    assert "missing" in captured.out + captured.err
