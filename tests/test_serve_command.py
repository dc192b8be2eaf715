"""`mmx serve` as it is called: one server that answers and drains, and calls that go wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest
from serving import CONFIG, make_engine
from talking import write_model

from mmx.cli import main, serve
from mmx.inference import decoding, engine
from mmx.inference.pool import PoolShape, init_pool
from mmx.inference.requests import Sampling
from mmx.inference.rows import empty_rows
from sharding import Partition

MMX = Path(sys.executable).with_name("mmx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("serve") / "a model")


def refused(capsys, *arguments):
    assert main(["serve", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: ")
    assert err.count("\n") == 1
    return err


def test_a_server_from_start_to_end(folder, tmp_path):
    """A key, a plan of its memory, an answer, an answer that is let end, exit code 0."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    arguments = [
        "serve", folder, "--port", "0", "--api-key-file", key, "--rows", "1", "--pages", "2",
        "--chunk", "256", "--grace", "100", "--no-warm-up", "--snapshots", "2",
    ]  # fmt: skip
    errors = (tmp_path / "stderr").open("w+")
    process = subprocess.Popen(
        [MMX, *map(str, arguments)], stdout=subprocess.PIPE, stderr=errors, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("mmx: serving a model at http://127.0.0.1:"), line
        url = line.split()[-1]
        with pytest.raises(OSError, match="401"):
            urllib.request.urlopen(url + "/models", timeout=20)
        health = urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=20)
        assert json.load(health) == {"status": "ok"}
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=250) as client:
            [model] = client.models.list().data
            stream = client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "hi"}], max_tokens=60,
                stream=True, temperature=0, extra_body={"ignore_eos": True},
            )  # fmt: skip
            parts = iter(stream)
            # The first word of a stream comes before its first token.
            while not next(parts).choices[0].delta.content:
                pass
            process.send_signal(signal.SIGTERM)
            rest = list(parts)
            assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
        errors.seek(0)
        said = errors.read().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("mmx: memory: parameters ")
        assert "total " in said[0]
    finally:
        process.kill()
        process.wait()
        errors.close()


def test_folders_that_cannot_be_served(folder, tmp_path, capsys):
    assert "no-such-folder" in refused(capsys, tmp_path / "no-such-folder", "--port", "0")
    assert "config.json" in refused(capsys, tmp_path, "--port", "0")
    (tmp_path / "it").mkdir()
    other = write_model(tmp_path / "it")
    (other / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in refused(capsys, other, "--port", "0")
    (other / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refused(capsys, other, "--port", "0")


def test_a_template_that_never_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "load_model", lambda *arguments: pytest.fail("it was loaded"))
    other = write_model(tmp_path / "it")
    (other / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    err = refused(capsys, other, "--port", "0")
    assert f"{other / 'chat_template.jinja'}: the chat template fails (SecurityError" in err


def test_addresses_that_cannot_be_had(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        err = refused(capsys, folder, "--port", port)
        assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in err
    for arguments, said in [
        (["--port", "70000"], "--port is 70000"),
        (["--port", "-1"], "--port is -1"),
        (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen on no.such.host"),
        (["--host", "a..b", "--port", "0"], "cannot listen on a..b"),
        (["--host", "203.0.113.77", "--port", "0"], "cannot listen on 203.0.113.77"),
    ]:
        assert said in refused(capsys, folder, *arguments)


@pytest.mark.parametrize("content", ["", " \n", "two words", "tab\there", "schlüssel", "x" * 5000])
def test_keys_that_are_none(content, folder, tmp_path, capsys):
    file = tmp_path / "key"
    file.write_text(content)
    err = refused(capsys, folder, "--port", "0", "--api-key-file", file)
    assert str(file) in err
    assert content not in err or not content.strip()  # nobody's key is printed


def test_a_key_file_that_is_not_there(folder, tmp_path, capsys):
    err = refused(capsys, folder, "--port", "0", "--api-key-file", tmp_path / "none")
    assert "none: no such file" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rows", "0"), ("--queue", "-1"), ("--pages", "0"), ("--page-size", "0"), ("--chunk", "300"),
     ("--chunk", "0"), ("--decode-steps", "0"), ("--snapshots", "-1"), ("--max-seq-len", "0"),
     ("--max-body", "0"), ("--connections", "0"), ("--grace", "-1"), ("--grace", "nan"),
     ("--grace", "inf"), ("--rows", "100000000"), ("--rows", "4097"),
     ("--pages", "100000000000000000000"), ("--page-size", "99999999999")],
)  # fmt: skip
def test_numbers_that_do_not_fit(option, value, folder, capsys):
    assert f"{option} is {value}" in refused(capsys, folder, "--port", "0", option, value)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "h11"])
def test_the_packages_of_servers_are_asked_for(missing, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert "pip install 'mmx[serve]'" in refused(capsys, folder, "--port", "0")


@pytest.fixture
def started(monkeypatch):
    """What `serve` would be called with, and the partitions of all, without a model loaded."""
    calls = []

    def of(*arguments, **options):
        calls[:0] = [x for x in (*arguments, *options.values()) if isinstance(x, Partition)]
        return None, None

    async def instead(*arguments, **options):
        calls.append(options)
        options["ready"](None)
        return True

    from mmx.inference import server

    monkeypatch.setattr(server, "serve", instead)
    monkeypatch.setattr(serve, "load_model", of)
    monkeypatch.setattr(serve, "check_memory", of)
    monkeypatch.setattr(serve, "_warm_up", lambda engine: None)
    fake = SimpleNamespace(max_seq_len=99)
    monkeypatch.setattr(serve.Room, "engine", lambda *a, **options: of(**options) and fake)
    monkeypatch.setattr(serve, "_room", lambda options, config: serve.Room(*[1] * 7, None))
    return calls


@pytest.mark.parametrize(
    ("arguments", "noted"),
    [
        ([], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key-file", "KEY"], False),
    ],
)
def test_an_open_door_is_noted(arguments, noted, started, folder, tmp_path, capsys):
    (tmp_path / "KEY").write_text("secret")
    arguments = [str(tmp_path / a) if a == "KEY" else a for a in arguments]
    assert main(["serve", str(folder), "--port", "0", "--model-name", "it", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mmx: serving it at http://")
    assert ("whoever can reach 0.0.0.0 can use this server; give --api-key-file" in err) == noted
    assert started[0]["key"] == ("secret" if "--api-key-file" in arguments else None)
    assert "secret" not in out + err


def test_the_mesh_is_that_of_loading_memory_and_engine(started, folder, capsys):
    arguments = ["serve", str(folder), "--port", "0", "--mesh", "seq=2"]
    assert main(arguments) == 0
    capsys.readouterr()
    loading, memory, made, _ = started
    assert loading == memory == made
    assert dict(made.mesh.shape) == dict(data=1, fsdp=1, expert=1, seq=2, tensor=1)


def test_nothing_is_compiled_after_the_warm_up():
    it = make_engine()
    serve._warm_up(it)
    assert it.idle
    assert len(it.snapshots) == it.snapshots.hits == it.snapshots.saved_tokens == 0
    assert it.pages.free == it.pages.count
    programs = (
        decoding.prefill, decoding.decode, engine.begin_row, engine.set_row, engine.set_pages,
        engine.deactivate,
    )  # fmt: skip
    before = [program._cache_size() for program in programs]
    began = time.perf_counter()
    for size in (1, 32, 33, 64, 100, 128, 200):
        it.generate([[7] * size], max_new_tokens=5, temperature=1.0)
    it.generate([[7] * 40], max_new_tokens=60, ignore_eos=True)  # which takes more pages
    assert [program._cache_size() for program in programs] == before
    assert time.perf_counter() - began < 60


def test_rows_that_are_sent_away_compile_nothing_after_the_warm_up():
    jax.clear_caches()  # others may have sent rows of this shape away
    it = make_engine()
    serve._warm_up(it)
    it.generate([[1]], max_new_tokens=2)
    compiled = []

    def note(event, duration, **unused):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for size in (3, 40, 150):  # of 1, 4 and 10 pages
            numbers = [
                it.submit([7] * size, Sampling(max_new_tokens=20, ignore_eos=True))
                for _ in range(2)
            ]
            while not all(request.decodes for request in it._at_work) or len(it._at_work) < 2:
                it.step()
            while it._under_way:
                it._look(leave=0)
            away = list(it._at_work)
            for request in reversed(away):
                it._send_away(request)
            assert [request.number for request in it._away] == numbers[::-1]
            while not it.idle:
                it.step()
        assert compiled == []
        jax.jit(lambda x: x - size)(1.0)
        assert compiled, "the counter counts"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_the_warm_up_reads_every_length_although_prefixes_are_kept():
    read, kept = [], []

    class Stub:
        sizes, max_seq_len, decode_steps = SimpleNamespace(chunk=1024), 2000, 2
        snapshots = SimpleNamespace(step=256, clear=kept.clear, hits=0, saved_tokens=0)
        rows = empty_rows(CONFIG, 1, 1)
        pool = init_pool(CONFIG, PoolShape(1, 1, 4, np.dtype(np.float32)))

        def generate(self, prompts, sampling):
            [prompt] = prompts
            found = max([n for n in kept if n < len(prompt)], default=0)
            read.append((found, len(prompt) - found))
            kept.append(len(prompt) // 256 * 256)

    serve._warm_up(Stub())  # pyright: ignore[reportArgumentType]
    assert {size for found, size in read if not found} >= {32, 64, 128, 256, 512, 1024}
    assert any(found for found, _ in read)  # beginning with a prefix is a program of its own
    assert kept == []
