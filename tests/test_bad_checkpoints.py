"""Spoilt and hostile checkpoints: one clear line from the API and from the command, never a trace.

The cases are in `spoilt.py`.
"""

import math
import pickle
import re
import warnings
from pathlib import Path

import checkpoints
import hypothesis
import numpy as np
import pytest
from checkpoints import INDEX, edit_fields
from cpu_clock import cpu_seconds
from hypothesis import strategies as st
from spoilt import CASES

import mmx
from mmx.cli import main

# Every message says what is wanted or what to do: one of these words.
REMEDY = re.compile(
    r"\b(download|convert|dequantize|put|set|use|give|choose|correct|check|remove|must|wants|"
    r"wanted|supported|known are|is a folder with|is this a)\b"
)


@pytest.fixture(params=CASES)
def spoilt(request, tmp_path):
    spoil, named = CASES[request.param]
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    spoil(folder)
    return folder, named


def test_load_says_what_and_where(spoilt):
    folder, named = spoilt
    with pytest.raises(ValueError) as caught:
        mmx.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert all(name in message for name in named), message
    assert message.isprintable(), ascii(message)


def test_load_says_what_to_do(spoilt):
    folder, _ = spoilt
    with pytest.raises(ValueError) as caught:
        mmx.load(folder)
    # The name of the folder must not be what matches.
    said = str(caught.value).replace(str(folder), "")
    assert REMEDY.search(said), said


def test_the_command_ends_with_one_line_and_code_2(spoilt, capsys):
    folder, named = spoilt
    assert main(["generate", str(folder), "--tokens", "1,2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: "), err
    assert err.endswith("\n")
    assert err[:-1].isprintable(), ascii(err)
    assert all(name in err for name in named), err


# ---------------------------------------------------------------- nothing is run


def test_pickles_are_never_opened(tmp_path):
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self):
            return Path.mkdir, (marker,)

    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb)
    assert marker.is_dir()  # it does go off
    marker.rmdir()
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.bin", "training_args.bin"):
        (folder / name).write_bytes(bomb)
    mmx.load(folder)  # beside safetensors they do not matter
    for file in folder.glob("model-*"):
        file.unlink()
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"\.bin but no safetensors.*convert"):
        mmx.load(folder)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        mmx.load(folder)
    assert not marker.exists()


def test_code_in_the_folder_is_never_run(tmp_path, monkeypatch):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    marker = tmp_path / "marker"
    bomb = f"import pathlib; pathlib.Path({str(marker)!r}).mkdir()"
    fields = checkpoints.read_fields(folder)
    modules = {name.split(".")[0] for name in fields["auto_map"].values()}
    assert modules == {"configuration_minimax_text_01", "modeling_minimax_text_01"}
    for name in (*modules, "__init__", "conftest", "sitecustomize", "json", "safetensors"):
        (folder / f"{name}.py").write_text(bomb)
    monkeypatch.chdir(folder)
    mmx.load(folder)
    mmx.load(".")
    assert not marker.exists()


@pytest.mark.parametrize("name", [checkpoints.RELEASED, "text/p08_fused_experts_top1"])
def test_an_absurd_number_of_experts_is_refused_at_once(name, tmp_path):
    folder = checkpoints.copy_golden(name, tmp_path / "it")
    edit_fields(folder, num_local_experts=100_000)
    start = cpu_seconds()
    with pytest.raises(ValueError, match=r"experts|gate"):
        mmx.load(folder)
    # Work in proportion to the files, not to a number in the config; a millionth of the time.
    assert cpu_seconds() - start < 3


# ---------------------------------------------------------------- at random


def small_folder(folder):
    fields = checkpoints.released_fields(attn_type_list=[0], num_hidden_layers=1)
    tensors = checkpoints.random_tensors(checkpoints.shapes(fields))
    return checkpoints.write_folder(folder, fields, tensors)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_header_is_read_or_refused(tmp_path_factory, data):
    """Bytes of the header changed, or the file cut: parameters or a ValueError, nothing else."""
    folder = small_folder(tmp_path_factory.getbasetemp() / "header")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = len(content) - len(checkpoints.split_file(bytes(content))[1])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config, _ = mmx.load(folder)
        except ValueError:
            return
    assert config.num_layers == 1


WORD = st.sampled_from(["F32", "BF16", "I8", "F4", "dtype", "", 0, -1, 2**70, None, True, 0.5, []])


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_well_formed_header_is_read_or_refused(tmp_path_factory, data):
    """Entries of the header replaced by other JSON."""
    folder = small_folder(tmp_path_factory.getbasetemp() / "entries")
    file = folder / "model.safetensors"
    header, content = checkpoints.split_file(file.read_bytes())
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    value = data.draw(WORD | st.lists(WORD, max_size=3) | st.lists(st.integers(0, 300), max_size=3))
    if field is None:
        header[data.draw(st.sampled_from([name, "__metadata__", "x"]))] = value
    else:
        header[name][field] = value
    file.write_bytes(checkpoints.join_file(header, content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config, _ = mmx.load(folder)
        except ValueError:
            return
    assert config.num_layers == 1


# ---------------------------------------------------------------- bad requests to a good checkpoint


@pytest.fixture(scope="module")
def model():
    """64 tokens in the vocabulary, 1024 in the longest sequence."""
    return mmx.load(checkpoints.GOLDEN / checkpoints.RELEASED)


def row(*tokens):
    return np.array([tokens], np.int64)


BAD_PROMPTS = {
    "id 64": (row(1, 64), {}, "contain the id 64; .*vocab_size=64"),
    "id -1": (row(-1, 2), {}, "contain the id -1; "),
    "id 2^40": (row(1, 2**40), {}, "contain the id 1099511627776; "),
    "id -2^32": (row(-(2**32), 2), {}, "contain the id -4294967296; "),
    "no tokens": (row(), {}, r"shape \(1, 0\)"),
    "no rows": (np.zeros((0, 3), np.int32), {}, r"shape \(0, 3\)"),
    "one axis": (np.array([1, 2]), {}, r"shape \(2,\)"),
    "floats": (np.ones((1, 2), np.float32), {}, "float32"),
    "booleans": (np.ones((1, 2), bool), {}, "bool"),
    "too long": (np.ones((1, 1025), np.int32), {}, "max_seq_len=1024"),
    "too long with the new": (np.ones((1, 1023), np.int32), {}, "max_seq_len=1024"),
    "empty row": (np.ones((2, 2), np.int32), {"mask": np.array([[1, 1], [0, 0]])}, "row 1 of mask"),
    "short mask": (row(1, 2), {"mask": np.ones((1, 1), np.int32)}, r"mask has shape \(1, 1\)"),
}
BAD_SAMPLING = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 10**30),
    ("temperature", -0.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", -0.1),
    ("top_p", 1.5),
    ("top_p", math.nan),
    ("top_k", -1),
    ("seed", 2**70),
    ("seed", -(2**70)),
]


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused(name, model):
    config, params = model
    tokens, options, wanted = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=wanted):
        mmx.generate(params, tokens, config, max_new_tokens=2, **options)


@pytest.mark.parametrize(
    "name", [name for name in BAD_PROMPTS if name not in ("empty row", "too long with the new")]
)
def test_forward_refuses_the_same(name, model):
    config, params = model
    tokens, options, wanted = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=wanted):
        mmx.forward(params, tokens, config, **options)


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING)
def test_bad_sampling_is_refused(name, value, model):
    config, params = model
    with pytest.raises(ValueError, match=name.split("_")[0]):
        mmx.generate(params, row(1, 2), config, **{"max_new_tokens": 2, name: value})


@pytest.mark.parametrize("stop", [64, -1, 2**40])
def test_bad_stop_ids_are_refused(stop, model):
    config, params = model
    with pytest.raises(ValueError, match=f"stop_ids is {stop}"):
        mmx.generate(params, row(1, 2), config, max_new_tokens=2, stop_ids=(3, stop))


def test_top_k_beyond_any_integer_keeps_all_or_is_refused(model):
    """2^70 is more than the vocabulary and more than an int32."""
    config, params = model
    options = {"max_new_tokens": 3, "temperature": 1.0, "seed": 1}
    try:
        kept = mmx.generate(params, row(1, 2), config, top_k=2**70, **options)
    except ValueError:
        return
    everything = mmx.generate(params, row(1, 2), config, top_k=64, **options)
    np.testing.assert_array_equal(kept, everything)


COMMANDS = [
    ["--tokens=1,64"],
    ["--tokens=-1"],
    ["--tokens=99999999999999999999999"],
    ["--tokens="],
    ["--tokens=,,"],
    ["--tokens=1;2"],
    ["--tokens=1.5"],
    ["--tokens=" + "1," * 1025],
    ["--prompt=hello"],  # no tokenizer there
    *(["--tokens=1,2", f"--{name.replace('_', '-')}={value}"] for name, value in BAD_SAMPLING),
]


@pytest.mark.parametrize("options", COMMANDS, ids=lambda options: " ".join(options)[:60])
def test_bad_commands_end_with_one_line_and_code_2(options, capsys):
    folder = str(checkpoints.GOLDEN / checkpoints.RELEASED)
    assert main(["generate", folder, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable(), err
