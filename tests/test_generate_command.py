"""`mmx generate`: where the prompt may come from, what is written where, and how it ends."""

import functools
import io
import os
import signal
import sys

import jax
import pytest
import rich.console
from serving import TOKENIZER
from talking import LENGTH, write_model

import mmx
from mmx.cli import generate, main, models
from mmx.inference import memory_plan
from mmx.inference.engine import Engine
from mmx.inference.text import encode
from sharding import MeshConfig, Partition, make_mesh
from sharding.rules import SERVING

TEXT = "The quick brown fox jumps over the lazy dog.\n"
LONG = TEXT * 13  # more than a chunk of 256 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    """The text that an engine of the same shape gives."""
    config, params = mmx.load(folder)
    engine = Engine(
        config, params, rows=1, pages=2, page_size=256, chunk=256, tokenizer=TOKENIZER, snapshots=0
    )

    def text(prompt, **options):
        ids = encode(TOKENIZER, prompt, config)
        assert 256 < len(ids) + 12 <= LENGTH
        return engine.generate([ids], **{"max_new_tokens": 12, **options})[0].text

    return text


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of a call with this on stdin; None is a terminal."""

    def call(*arguments, stdin=None):
        if isinstance(stdin, bytes):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        else:
            terminal = io.StringIO()
            terminal.isatty = lambda: True
            monkeypatch.setattr(sys, "stdin", terminal)
        common = ["generate", str(folder), "--max-new-tokens", "12"]
        return (main([*common, *map(str, arguments)]), *capsys.readouterr())

    return call


def test_prompts_of_all_kinds_are_the_same_text(run, expected, tmp_path):
    file, context = tmp_path / "prompt.txt", tmp_path / "context.txt"
    file.write_text(LONG)
    wanted = expected(LONG) + "\n"
    assert run("--prompt", LONG) == (0, wanted, "")
    assert run("--prompt-file", file) == (0, wanted, "")
    assert run("--prompt-file", "-", stdin=LONG.encode()) == (0, wanted, "")
    assert run(stdin=LONG.encode()) == (0, wanted, "")
    context.write_text(LONG[:-20])
    for rest in (["--prompt", LONG[-20:]], []):
        code, out, err = run("--context-file", context, *rest, stdin=LONG[-20:].encode())
        assert (code, out) == (0, wanted)
        assert err.startswith("mmx: memory: parameters ")  # and no bar where nobody watches
        assert err.count("\n") == 1


def test_options_of_sampling(run, expected):
    drawn = dict(temperature=1.5, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=3)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in drawn.items()]
    code, out, err = run("--prompt", LONG, *flags, "--ignore-eos")
    assert (code, out, err) == (0, expected(LONG, ignore_eos=True, **drawn) + "\n", "")
    free = expected(LONG)
    stop = free[4:6]
    code, out, _ = run("--prompt", LONG, "--stop", "never there", "--stop", stop)
    assert (code, out) == (0, free[: free.index(stop)] + "\n")


def test_text_comes_as_it_is_made(run, expected, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate, "show", pieces.append)
    assert run("--prompt", LONG)[0] == 0
    assert "".join(pieces) == expected(LONG) + "\n"
    assert len(pieces) > 8


def test_a_bar_for_those_who_watch(run, expected, monkeypatch):
    seen = io.StringIO()
    console = functools.partial(rich.console.Console, force_terminal=True, file=seen, width=80)
    monkeypatch.setattr(rich.console, "Console", lambda **options: console())
    code, out, _ = run("--prompt", LONG)
    assert (code, out) == (0, expected(LONG) + "\n")
    assert "prompt" in seen.getvalue()
    assert f"256/{len(TOKENIZER.encode(LONG).ids)}" in seen.getvalue()


def test_control_characters_reach_no_terminal(monkeypatch, capsys):
    text = "a\x1b[2J\x07b\n\tc\x9b1m\u202e好"
    models.show(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    models.show(text)
    assert capsys.readouterr().out == "a\ufffd[2J\ufffdb\n\tc\ufffd1m\u202e好"


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line(run, folder, tmp_path):
    binary, empty, large = (tmp_path / name for name in ("binary", "empty", "large"))
    binary.write_bytes(b"abc\xff")
    empty.write_bytes(b"")
    large.write_bytes(b"x" * 200_000)
    for arguments, stdin, said in [
        ([], None, "give one of --prompt TEXT, --prompt-file FILE and --tokens 1,2,3, or text on"),
        (["--prompt", "a", "--tokens", "1"], None, "give one of"),
        (["--prompt", "a", "--prompt-file", empty], None, "give one of"),
        (["--prompt-file", tmp_path / "none"], None, f"{tmp_path}/none: No such file"),
        (["--prompt-file", tmp_path], None, f"{tmp_path}: Is a directory"),
        (["--prompt-file", binary], None, "binary: byte 3 is no UTF-8"),
        (["--context-file", binary, "--prompt", "x"], None, "binary: byte 3 is no UTF-8"),
        ([], b"\xff", "stdin: byte 0 is no UTF-8"),
        (["--prompt-file", empty], None, "the prompt is empty"),
        ([], b"", "the prompt is empty"),
        (["--prompt-file", large], None, "large: more than "),
        (["--prompt", TEXT * 40], None, "so for a prompt of 500"),
        (["--tokens", "1,2", "--stop", "x"], None, "--stop are text"),
        (["--tokens", "1,2", "--context-file", empty], None, "--context-file and --stop are text"),
        (["--tokens", "1,999"], None, "the prompt holds the id 999"),
        (["--prompt", "a", "--temperature", "-1"], None, "temperature is -1"),
        (["--prompt", "a", "--top-p", "0"], None, "top_p is 0"),
        (["--prompt", "a", "--min-p", "2"], None, "min_p is 2"),
        (["--prompt", "a", "--stop", ""], None, "an entry of stop is ''"),
        (["--prompt", "a", "--max-new-tokens", "0"], None, "max_new_tokens is 0"),
        (["--prompt", "a", "--max-new-tokens", "9999"], None, "max_new_tokens is 9999"),
    ]:
        code, out, err = run(*arguments, stdin=stdin)
        assert (code, out) == (2, ""), (arguments, err)
        assert err.startswith("mmx: error: "), arguments
        assert err.count("\n") == 1
        assert said in err, (said, err)


def test_a_prompt_that_memory_does_not_hold(run, monkeypatch):
    """Says how long it could be: all but one of the pages it needs are there."""
    needed = []
    plan = memory_plan.plan_memory

    def planning(*arguments, **options):
        made = plan(*arguments, **options)
        needed.append(made)
        return made

    monkeypatch.setattr(memory_plan, "plan_memory", planning)
    page = []
    monkeypatch.setattr(
        memory_plan,
        "device_memory",
        lambda: 10**12 if not needed else needed[0].total - page[0],
    )
    assert run("--prompt", LONG)[0] == 0
    page.append(needed[0].pages // 2)
    code, out, err = run("--prompt", LONG)
    assert (code, out) == (2, "")
    assert "keys and values of 256 tokens fit, 512 are asked for" in err
    assert err.count("\n") == 1


def test_pages_are_counted_as_devices_share_them(monkeypatch):
    """Two pages are asked for and 8 devices have one each: there is room for 7, so for none."""
    room = models.Room(1, 2, 256, 512, 256, 4, 0, None)
    plan = memory_plan.MemoryPlan(8000, 0, 800, 0, 0, 0)
    monkeypatch.setattr(memory_plan, "plan_engine", lambda *arguments, **options: plan)
    for devices, fit in ((1, 256), (2, 0), (8, 0)):
        monkeypatch.setattr(memory_plan, "device_memory", lambda: plan.total - 1)
        partition = Partition(make_mesh(MeshConfig(fsdp=1, seq=devices), jax.devices()[:devices]),
                              SERVING)  # fmt: skip
        with pytest.raises(ValueError, match=f"values of {fit:,} tokens fit, 512 are asked for"):
            models.check_memory(None, None, room, partition if devices > 1 else None)


def test_int8_is_asked_of_the_loader(run, monkeypatch):
    def load(path, **options):
        raise ValueError(f"weights={options['weights']}")

    monkeypatch.setattr(mmx, "load", load)
    assert run("--prompt", "a", "--weights", "int8")[2] == "mmx: error: weights=int8\n"
    assert run("--prompt", "a")[2] == "mmx: error: weights=None\n"


def test_fp8_is_asked_of_the_engine(run, monkeypatch):
    def engine(config, params, **options):
        raise ValueError(f"kv_dtype={options['kv_dtype']}")

    monkeypatch.setattr("mmx.inference.engine.Engine", engine)
    assert run("--prompt", "a", "--kv-dtype", "fp8")[2] == "mmx: error: kv_dtype=float8_e4m3fn\n"
    assert run("--prompt", "a")[2] == "mmx: error: kv_dtype=None\n"


def test_over_devices_the_text_is_the_same(tmp_path, monkeypatch, capsys):
    folder, made = write_model(tmp_path / "model", num_local_experts=4), []
    init = Engine.__init__

    def watched(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", watched)
    call = ["generate", str(folder), "--prompt", TEXT, "--max-new-tokens", "12"]
    assert main(call) == 0
    wanted = capsys.readouterr()
    (tmp_path / "context").write_text("")  # with a context the memory is printed
    mesh = ["--mesh", "expert=2,seq=2", "--context-file", str(tmp_path / "context")]
    assert main([*call, *mesh]) == 0
    out, err = capsys.readouterr()
    assert (out, wanted.err) == (wanted.out, "")
    assert err.startswith("mmx: memory: ")
    assert err.endswith(" on each of 4 devices\n")
    alone, engine = made
    assert alone.partition is None
    assert dict(engine.partition.mesh.shape) == dict(data=1, fsdp=1, expert=2, seq=2, tensor=1)
    for whole in jax.tree.leaves(engine.pool):
        shares = 2 if whole is engine.pool.lightning_states else 4  # of heads, and of pages
        assert shares * whole.addressable_shards[0].data.size == whole.size
    halves = [
        x for x in jax.tree.leaves(engine.params) if x.sharding.shard_shape(x.shape) != x.shape
    ]
    assert len(halves) > 5


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("expert=2", "are 1 or 3"),
        ("expert=2,data=2", "so data and fsdp are 1; give expert, seq and tensor"),
        ("fsdp=2", "so data and fsdp are 1"),
        ("tensor=2,seq=64", "takes 128 devices and there are 8"),
        ("experts=2", "'experts' is no axis of data, fsdp, expert, seq, tensor"),
        ("expert", "'expert' is not AXIS=NUMBER"),
        ("expert=--2", "'expert=--2' is not AXIS=NUMBER"),
        ("data=-1", "so data and fsdp are 1"),
        ("expert=-1", "8 devices (expert=8) cannot share evenly"),
    ],
)
def test_meshes_that_are_refused(run, monkeypatch, mesh, said):
    monkeypatch.setattr(mmx, "load", lambda *a, **o: pytest.fail("it was loaded"))
    code, out, err = run("--prompt", "a", "--mesh", mesh)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# ---------------------------------------------------------------- how it ends


@pytest.fixture
def interruptible():
    """Ctrl-C as a shell leaves it; what is started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_line(run, expected, monkeypatch):
    pieces = []

    def interrupting(text):
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "show", interrupting)
    assert run("--prompt", LONG) == (130, "", "")
    *texts, end = pieces
    assert end == "\n"
    assert expected(LONG).startswith("".join(texts))


def test_a_reader_that_goes_is_no_error(run, monkeypatch):
    """As `mmx generate ... | head -c 1`."""
    reader, writer = os.pipe()
    out = os.fdopen(writer, "w")

    def closing(text):
        os.close(reader) if not shown else None
        shown.append(text)
        out.write(text)
        out.flush()

    shown = []
    monkeypatch.setattr(generate, "show", closing)
    monkeypatch.setattr(sys, "stdout", out)
    code, _, err = run("--prompt", LONG)
    assert (code, err) == (141, "")
    out.close()
