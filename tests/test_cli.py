"""The `mmx` command: in this process where that is the same, as an installed command otherwise."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from cpu_clock import cpu_seconds
from tokenizers import Tokenizer, models, pre_tokenizers

import mmx
from mmx.cli import COMMANDS, main

GOLDEN = checkpoints.GOLDEN
MMX = Path(sys.executable).with_name("mmx")


def environment(**changes):
    # The accelerator of the machine, if any, is not what is tested here.
    return {**os.environ, "JAX_PLATFORMS": "cpu", **changes}


def command(*arguments, **options):
    """Run the installed command."""
    return subprocess.run(
        [MMX, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        **options,
    )


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return done.stdout


def usage_error(arguments, capsys):
    """Exit code, stdout and stderr of a call that never gets to work."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


# ---------------------------------------------------------------- help


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        start = cpu_seconds()
        done = command("--help")
        seconds.append(cpu_seconds() - start)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS)
    assert 0.01 < min(seconds) < 0.3  # the best of five: caches are cold or shared


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["-h"], ["help"], ["--version"], ["info", "--help"],
                  ["generate", "--help"], ["chat", "--help"], ["serve", "--help"], ["nonsense"]]
)  # fmt: skip
def test_jax_is_not_imported_before_it_is_needed(arguments):
    code = (
        "import sys, mmx.cli\n"
        "try: mmx.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('IMPORTED', sorted({'jax', 'jaxlib', 'flax'} & {*sys.modules}))"
    )
    assert python(code, *arguments).splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: mmx COMMAND")
    assert err == ""
    assert all(f"{name} " in out and text in out for name, text in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_commands(name, capsys):
    code, out, err = usage_error([name, "--help"], capsys)
    assert code == 0
    assert f"usage: mmx {name}" in out
    assert err == ""


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mmx", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mmx", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mmx {mmx.__version__}\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmx {mmx.__version__}\n"


def test_unknown_command(capsys):
    assert main(["bake"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    names = "info, plan, generate, chat, serve, train, extend, convert, verify, inspect, data, plot"
    assert err == f"mmx: error: unknown command 'bake'; choose one of {names}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["info", "tiny", "--bogus"], "--bogus"),
        (["generate", "folder", "--tokens", "1", "--bogus", "2"], "--bogus"),
        (["generate", "folder", "--tokens", "1", "--top-k", "many"], "--top-k"),
        (["generate", "folder", "--tokens", "1", "--dtype", "fp16"], "--dtype"),
        (["generate", "--tokens", "1"], "PATH"),
        (["info"], "mmx info --help"),
    ],
)
def test_wrong_options_are_named(arguments, named, capsys):
    code, out, err = usage_error(arguments, capsys)
    assert code == 2
    assert out == ""
    assert named in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- info


@pytest.mark.parametrize("name", ["minimax-text-01", "minimax-m1-40k", "minimax-m1-80k"])
def test_info_of_the_released_models(name, capsys):
    assert main(["info", name]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "80 = 10 x (7 lightning + 1 softmax)" in out
    assert "456,089,655,296 (456.09 B)" in out
    assert "45,944,920,064 (45.94 B)" in out
    # 70 layers x 64 heads x 128 x 128 x 4 bytes; 10 layers x 2 x 8 heads x 128 x 2 bytes
    assert "293.6 MB fp32" in out
    assert "41.0 kB bf16" in out
    # 40,960 bytes x 8192, 2^20 and 2^22 tokens, with the state
    for tokens, total in (("8K", "629.1 MB"), ("1M", "43.2 GB"), ("4M", "172.1 GB")):
        line = next(line for line in out.splitlines() if f"a sequence of {tokens}" in line)
        assert total in line
    assert "10,240,000 tokens" in out


@pytest.mark.parametrize("name", checkpoints.GOLDEN_NAMES)
def test_info_of_a_folder(name, capsys):
    assert main(["info", str(GOLDEN / name)]) == 0
    out = capsys.readouterr().out
    tensors = checkpoints.read_folder(GOLDEN / name)
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    total = sum(tensor.size for key, tensor in tensors.items() if not key.endswith(tables))
    assert f"{total:,} " in out
    fields = checkpoints.read_fields(GOLDEN / name)
    assert f"{fields['num_attention_heads']} heads x {fields['head_dim']}" in out


def test_info_reads_no_weights(tmp_path, capsys):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    for file in folder.glob("model*"):
        file.unlink()
    assert main(["info", str(folder)]) == 0
    assert "4 = 1 x (3 lightning + 1 softmax)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["minimax-text-02", "no/such/folder", "README.md"])
def test_info_of_nothing(name, capsys):
    assert main(["info", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mmx: error: {name}: neither a folder nor a preset (")
    assert err.count("\n") == 1
    assert "minimax-text-01" in err


def test_info_of_a_folder_with_a_bad_config(tmp_path, capsys):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    checkpoints.edit_fields(folder, hidden_act="gelu")
    assert main(["info", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == f"mmx: error: {folder}/config.json: hidden_act is 'gelu'; only 'silu' is supported\n"
    )


# ---------------------------------------------------------------- generate


def golden(name):
    """The unpadded prompts of a golden checkpoint and their recorded continuations."""
    recorded = checkpoints.read_file(GOLDEN / name / "golden.safetensors")
    return recorded["input_ids"], recorded["generated"]


def ids(array):
    return ",".join(str(token) for token in array)


@pytest.mark.parametrize("name", [checkpoints.RELEASED, checkpoints.TRANSFORMERS])
def test_generate_from_tokens(name, capsys):
    prompts, continuations = golden(name)
    length = str(continuations.shape[1])
    arguments = ["--tokens", ids(prompts[0]), "--max-new-tokens", length]
    assert main(["generate", str(GOLDEN / name), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == ids(continuations[0]) + "\n"
    assert err == ""


def test_generate_as_an_installed_command():
    """bf16 weights computed in fp32, as the recorded float64 numbers need."""
    name = checkpoints.RELEASED_BF16
    prompts, continuations = golden(name)
    length = continuations.shape[1]
    done = command("generate", GOLDEN / name, "--tokens", ids(prompts[0]),
                   "--max-new-tokens", length, "--dtype", "fp32")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ids(continuations[0]) + "\n"), done.stderr


def test_tokens_may_have_spaces(capsys):
    folder = str(GOLDEN / checkpoints.RELEASED)
    for text in ("7,3,5", "7, 3 ,5", "7,3,5,", " 7,3,5"):
        assert main(["generate", folder, "--tokens", text, "--max-new-tokens", "3"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert others == [first] * 3


def with_tokenizer(folder):
    """A tokenizer of words w0 ... w63 for a vocabulary of 64."""
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_generate_from_a_prompt(tmp_path, capsys):
    prompts, continuations = golden(checkpoints.RELEASED)
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    with_tokenizer(folder)
    prompt = " ".join(f"w{token}" for token in prompts[0])
    length = str(continuations.shape[1])
    assert main(["generate", str(folder), "--prompt", prompt, "--max-new-tokens", length]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [f"w{token}" for token in continuations[0]]
    assert err == ""


def test_generate_stops_at_the_end_token_of_the_config(tmp_path, capsys):
    prompts, continuations = golden(checkpoints.RELEASED)
    wanted = continuations[0].tolist()
    stop = wanted[5]
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    checkpoints.edit_fields(folder, eos_token_id=stop)
    arguments = ["--tokens", ids(prompts[0]), "--max-new-tokens", "24"]
    assert main(["generate", str(folder), *arguments]) == 0
    assert capsys.readouterr().out == ids(wanted[: wanted.index(stop) + 1]) + "\n"


def test_sampling_depends_on_the_seed_alone(capsys):
    folder = str(GOLDEN / checkpoints.RELEASED)
    options = ["--tokens=1,2,3", "--max-new-tokens=16", "--temperature=1.5"]
    for seed in ("1", "1", "2"):
        assert main(["generate", folder, *options, "--seed", seed]) == 0
    first, again, other = capsys.readouterr().out.splitlines()
    assert first == again != other
    assert len(first.split(",")) == 16


@pytest.mark.parametrize("options", [[], ["--prompt", "w1", "--tokens", "1"]])
def test_a_prompt_or_tokens_and_not_both(options, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", str(GOLDEN / checkpoints.RELEASED), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: give one of --prompt TEXT, --prompt-file FILE and --tokens")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "give --tokens"),
        ("not json", "not a tokenizer"),
        ("{}", "not a tokenizer"),
        ("[1]", "not a tokenizer"),
    ],
)
def test_missing_or_broken_tokenizer(content, named, tmp_path, capsys):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert main(["generate", str(folder), "--prompt", "w1 w2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mmx: error: {folder}/tokenizer.json: ")
    assert err.count("\n") == 1
    assert named in err


def test_a_prompt_without_tokens_and_one_beyond_the_vocabulary(tmp_path, capsys):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    with_tokenizer(folder)
    for prompt in ("", "   "):
        assert main(["generate", str(folder), "--prompt", prompt]) == 2
        assert "the prompt is empty" in capsys.readouterr().err
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w64"] = 64
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["generate", str(folder), "--prompt", "w64"]) == 2
    assert "id 64" in capsys.readouterr().err


def test_notes_go_to_stderr(tmp_path, capsys):
    folder = checkpoints.copy_golden(checkpoints.RELEASED, tmp_path / "it")
    checkpoints.edit_fields(folder, use_mamba=True)
    name = "image_newline"
    shard = "model-00001-of-00003.safetensors"
    assert main(["info", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "use_mamba" not in out
    assert err == "mmx: note: config.json: unknown keys are not used: use_mamba\n"
    checkpoints.edit_fields(folder, use_banana=True)  # Python shows the same warning only once
    checkpoints.edit_tensors(folder, shard, lambda t: t.update({name: np.ones(3, np.float32)}))
    assert main(["generate", str(folder), "--tokens", "1"]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("mmx: note: ")
    assert error.startswith("mmx: error: ")
    assert name in error


# ---------------------------------------------------------------- pipes


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["--help"], ""),
        (["--help"], "1"),
        (["--version"], ""),
        (["--version"], "1"),
        (["info", "--help"], ""),
        (["info", "tiny"], ""),
        (["info", "tiny"], "1"),
        (["generate", str(GOLDEN / checkpoints.RELEASED), "--tokens=1", "--max-new-tokens=1"], ""),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else f"unbuffered={value}",
)
def test_a_reader_that_has_gone_is_no_error_message(arguments, unbuffered):
    """As `mmx ... | head -0`, but surely closed before the first byte."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [MMX, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(PYTHONUNBUFFERED=unbuffered),
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1, 141)  # 141 is what a shell shows for a closed pipe
