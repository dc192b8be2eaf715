"""`mmx chat`, and that it, `mmx generate` and a server give the same tokens."""

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from serving import TOKENIZER, call, running
from talking import LENGTH, system_of, write_model

import mmx
from mmx.cli import chat, main
from mmx.inference import engine as engines
from mmx.inference.chat import ChatTemplate, render_chat
from mmx.inference.conversation import Conversation
from mmx.inference.engine import Engine
from mmx.inference.requests import Sampling

NEW = 12
FIRST, SECOND = "The quick brown fox", "jumps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("talk") / "model")


@pytest.fixture(scope="module")
def model(folder):
    config, params = mmx.load(folder)
    return SimpleNamespace(config=config, params=params, system=system_of(258, config, FIRST))


def make(model, **options):
    """What the commands make for conversations of this length."""
    shape = dict(rows=1, pages=LENGTH // 256, page_size=256, max_seq_len=LENGTH, chunk=256)
    return Engine(model.config, model.params, tokenizer=TOKENIZER, **{**shape, **options})


def talk(monkeypatch, capsys, folder, lines, *options):
    """Exit code, stdout and stderr of `mmx chat` with these lines on its stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    arguments = ["chat", str(folder), "--max-new-tokens", str(NEW), *options]
    return (main(arguments), *capsys.readouterr())


def conversation(model, system=None, **options):
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    return Conversation(make(model, **options), ChatTemplate(), sampling, system)


# ---------------------------------------------------------------- the conversation


def test_a_turn_reads_only_what_the_one_before_has_not(model, monkeypatch):
    read = []
    prefill = engines.prefill

    def counting(params, pool, tokens, count, *rest, **options):
        read.append(int(count))
        return prefill(params, pool, tokens, count, *rest, **options)

    monkeypatch.setattr(engines, "prefill", counting)
    it = conversation(model, model.system)
    assert it.engine.snapshots.step == 256
    for number, message in enumerate((FIRST, SECOND)):
        prompt = it.prompt(message)
        kept = len(it.engine.snapshots)
        answer = "".join(it.ask(message))
        # What the turn before has left at the last boundary of 256 tokens is not read again.
        assert sum(read) == len(prompt) - 256 * number
        assert kept == number
        assert it.engine.snapshots.saved_tokens == 256 * number
        # ... and the answer is that of an engine that has read all of it.
        alone = make(model, snapshots=0).generate([prompt], max_new_tokens=NEW, ignore_eos=True)
        assert alone[0].text == answer
        read.clear()
    assert [m["role"] for m in it.messages] == ["user", "assistant"] * 2
    assert it.messages[-1]["content"] == answer
    it.reset()
    assert len(it.prompt(FIRST)) < len(prompt)


def test_an_answer_that_is_ended_stays_as_far_as_it_came(model):
    it = conversation(model)
    whole = "".join(it.ask(FIRST))
    it.reset()
    pieces = []
    for piece in it.ask(FIRST, ended=lambda: bool(pieces)):
        pieces.append(piece)
    part = "".join(pieces)
    assert part != whole
    assert whole.startswith(part)
    assert it.finish_reason == "cancelled"
    assert it.messages[-1] == {"role": "assistant", "content": part}
    assert it.engine.idle
    assert it.engine.load == (0, 0)
    it.reset()
    assert "".join(it.ask(FIRST)) == whole  # what was under way reaches nobody
    it.engine.snapshots.clear()
    assert it.engine.pages.free == it.engine.pages.count


def test_what_cannot_be_answered_is_not_part_of_the_conversation(model):
    it = conversation(model)
    "".join(it.ask(FIRST))
    before = list(it.messages)
    with pytest.raises(ValueError, match=f"there is room for {LENGTH}"):
        "".join(it.ask("no room for this " * 200))
    with pytest.raises(ValueError, match="not Unicode"):
        "".join(it.ask("\ud800"))
    assert it.messages == before
    # The last answer is as long as there is room for.
    it.sampling = Sampling(max_new_tokens=LENGTH, ignore_eos=True)
    size = len(it.prompt(SECOND))
    "".join(it.ask(SECOND))
    assert it.finish_reason == "length"
    with pytest.raises(ValueError, match=f"there is room for {LENGTH}"):
        "".join(it.ask("x" * (LENGTH - size)))


def test_a_tokenizer_without_markers_has_no_conversations(model):
    bare = SimpleNamespace(token_to_id=lambda name: None)
    engine = SimpleNamespace(tokenizer=bare, config=model.config)
    with pytest.raises(ValueError, match="no chat template; use mmx generate"):
        Conversation(engine, ChatTemplate(), Sampling())  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- the command


def test_chat_and_serve_and_generate_give_the_same(folder, model, monkeypatch, capsys):
    drawn = ["--temperature", "0.8", "--seed", "5", "--ignore-eos"]
    code, out, err = talk(
        monkeypatch, capsys, folder, f"{FIRST}\n{SECOND}\n",
        "--system", model.system, "--max-seq-len", str(LENGTH), *drawn,
    )  # fmt: skip
    assert (code, err) == (0, "")
    messages = [{"role": "system", "content": model.system}]
    texts = []
    changes = dict(config=model.config, name="it")
    with running(engine=make(model), **changes) as server:
        for message in (FIRST, SECOND):
            messages.append({"role": "user", "content": message})
            body = {
                "model": "it", "messages": messages, "max_tokens": NEW, "temperature": 0.8,
                "seed": 5, "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            [choice] = call(server, "/v1/chat/completions", body).json["choices"]
            prompt, tokens = choice["prompt_token_ids"], choice["token_ids"]
            texts.append(choice["message"]["content"])
            # By ids, and by the text that the template makes.
            length = ["--max-new-tokens", str(NEW), *drawn]
            ids = ",".join(map(str, prompt))
            assert main(["generate", str(folder), "--tokens", ids, *length]) == 0
            assert capsys.readouterr().out == ",".join(map(str, tokens)) + "\n"
            rendered = render_chat(ChatTemplate(), messages)
            assert main(["generate", str(folder), "--prompt", rendered, *length]) == 0
            assert capsys.readouterr().out == texts[-1] + "\n"
            messages.append(choice["message"] | {"refusal": None})
    assert out == "".join(text + "\n" for text in texts)


@pytest.fixture
def answering(monkeypatch):
    """`mmx chat` with a model that says back what it is told, and counts."""

    class Echo:
        def __init__(self):
            self.messages = []

        def ask(self, text, *, ended):
            if text == "fail":
                raise ValueError("this cannot\nbe answered")
            self.messages.append(text)
            for piece in (str(len(self.messages)), ":", text):
                if ended():
                    return
                yield piece

        def reset(self):
            self.messages.clear()

    monkeypatch.setattr(chat, "_open", lambda options: Echo())


def test_commands_and_lines_of_a_pipe(answering, monkeypatch, capsys):
    lines = "hi\n\n  \nfail\n/help\n/nonsense x\n  there  \n/reset\nagain\n/exit\nnever\n"
    code, out, err = talk(monkeypatch, capsys, "folder", lines)
    assert code == 0
    assert out == "1:hi\n2:there\n1:again\n"
    failed, helped, unknown = err.splitlines()
    assert failed == "mmx: note: this cannot be answered"
    assert "/reset begins anew" in helped
    assert unknown.startswith("mmx: note: /nonsense is no command; ")


@pytest.mark.parametrize("lines", ["", "hi\n", "hi"])
def test_the_end_of_stdin_is_the_end(lines, answering, monkeypatch, capsys):
    code, out, err = talk(monkeypatch, capsys, "folder", lines)
    assert (code, out, err) == (0, "1:hi\n" if lines else "", "")


def test_ctrl_c_ends_the_answer_and_not_the_program(answering, monkeypatch, capsys):
    write = chat.show

    def interrupting(text):
        write(text)
        if text == ":" and "there" not in interrupted:
            interrupted.append("there")
            signal.raise_signal(signal.SIGINT)

    interrupted = []
    monkeypatch.setattr(chat, "show", interrupting)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = talk(monkeypatch, capsys, "folder", "hi\nthere\n")
    assert (code, out, err) == (0, "1:\n2:there\n", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_it_all():
    code = (
        "import signal, mmx.cli.chat as chat\n"
        "with chat._interrupts() as seen:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print(seen, flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "[2]\n", "")


def test_a_terminal_has_a_prompt_and_no_escapes(answering, monkeypatch, capsys):
    lines = iter(["a\x1b[2Jb", KeyboardInterrupt(), "c", EOFError()])

    def typed(prompt):
        assert prompt == "> "
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["chat", "folder"]) == 0
    out, err = capsys.readouterr()
    assert out == "1:a\ufffd[2Jb\n\n2:c\n\n"
    assert "Ctrl-C ends an answer" in err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja: the chat template fails (Templ"),
        ("config.json", "[]", "config.json"),
    ],
)
def test_folders_one_cannot_talk_with(name, content, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mmx, "load", lambda *arguments, **options: pytest.fail("it was loaded"))
    folder = write_model(tmp_path / "it")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    code, out, err = talk(monkeypatch, capsys, folder, "hi\n")
    assert (code, out) == (2, "")
    assert err.startswith("mmx: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_answers_may_be_as_long_as_the_model_has_room_for(folder):
    """By default they may have 1,024 tokens, which is more than this model has."""
    it = chat._open(chat.Chat(path=folder))
    assert LENGTH < 1024
    assert it.sampling.max_new_tokens == it.engine.max_seq_len == LENGTH
    assert it.engine.partition is None


@pytest.mark.slow
def test_over_devices_a_conversation_is_the_same(folder):
    both = [chat._open(chat.Chat(path=folder, max_new_tokens=NEW, mesh=m)) for m in ("", "seq=2")]
    said = [["".join(it.ask(message)) for message in (FIRST, SECOND)] for it in both]
    assert said[0] == said[1]
    pages = both[1].engine.pool.key_pages
    assert 2 * pages.addressable_shards[0].data.size == pages.size


def test_a_template_that_fails_is_a_note(folder, model, monkeypatch, capsys):
    it = conversation(model)
    it.template = ChatTemplate("{{ ''.__class__ }}", file="it")
    monkeypatch.setattr(chat, "_open", lambda options: it)
    code, out, err = talk(monkeypatch, capsys, folder, "hi\n")
    assert (code, out) == (0, "")
    assert err.startswith("mmx: note: it: the chat template fails (SecurityError")
    assert err.count("\n") == 1
    assert np.all([not it.messages, it.engine.idle])
