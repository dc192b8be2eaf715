import json
import random
import threading
import time

import pytest
from random_models import small_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mmx.data.tokenizer import train_tokenizer
from mmx.inference import text
from mmx.inference.text import Spelling, TextStream, decode, encode, load_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, twice.\n",
    "深度学习模型在长上下文中保持精确。注意力机制是线性的。\n",
    "日本語のテキストもあります。カタカナとひらがな。\n",
    "👩‍👩‍👧‍👦 emoji 🎉🔥 and flags 🇩🇪🇯🇵 mixed 👍🏽 with words\n",
    "Ünïcödé à la carte — naïve café, Žluťoučký kůň, Привет мир\n",
    "already broken: � here\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    trained = train_tokenizer(SENTENCES * 3, vocab_size=420)
    trained.add_tokens([AddedToken("näh 好", special=False)])
    return trained


@pytest.fixture(scope="module")
def sequences(tokenizer):
    """200 of random ids, which seldom are UTF-8, and of text with a few ids changed."""
    rng = random.Random(0)
    size = tokenizer.get_vocab_size()
    found = []
    for i in range(200):
        if i % 2:
            ids = [rng.randrange(size) for _ in range(rng.randrange(1, 40))]
        else:
            ids = tokenizer.encode("".join(rng.sample(SENTENCES, 2))).ids[: rng.randrange(1, 80)]
            for _ in range(rng.randrange(3)):
                ids[rng.randrange(len(ids))] = rng.randrange(size)
        found.append(ids)
    return found


def stream(tokenizer, parts, stop=()):
    it = TextStream(tokenizer, tuple(stop))
    return [it.push(part) for part in parts], it.finish()


# ---------------------------------------------------------------- text as it arrives


def test_streamed_text_is_the_text_at_every_split(tokenizer, sequences):
    seen_unknown = 0
    for ids in sequences:
        whole = tokenizer.decode(ids)
        seen_unknown += "\ufffd" in whole
        for split in range(len(ids) + 1):
            pieces, rest = stream(tokenizer, [ids[:split], ids[split:]])
            assert "".join(pieces) + rest == whole
            assert whole.startswith(pieces[0])
        pieces, rest = stream(tokenizer, [[token] for token in ids])
        assert "".join(pieces) + rest == whole
    assert seen_unknown > 50


def test_text_is_given_as_soon_as_it_is_certain(tokenizer, sequences):
    """Whole characters are not held: after each token, all but a character's first bytes is out."""
    for ids in sequences[::2][:30]:
        it, out = TextStream(tokenizer), ""
        for count, token in enumerate(ids, 1):
            out += it.push([token])
            whole = tokenizer.decode(ids[:count])
            assert out in (whole, whole[:-1])
            assert out == whole or whole[-1] == "\ufffd"


def test_a_character_in_four_bytes_comes_whole(tokenizer):
    plain = train_tokenizer([], vocab_size=258)  # bytes alone
    ids = plain.encode("a🎉b").ids
    assert len(ids) == 6
    assert stream(plain, [[token] for token in ids]) == (["a", "", "", "", "🎉", "b"], "")
    assert stream(plain, [[token] for token in ids[:3]]) == (["a", "", ""], "\ufffd")


def test_every_byte_is_spelled_as_the_library_spells_it():
    spelled = text._byte_of_character()
    assert sorted(spelled) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for character, byte in spelled.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([character]) == chr(byte)
    latin = "".join(map(chr, range(128, 256)))
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        latin
    )
    assert bytes(spelled[c] for c in piece[0]) == latin.encode()


def test_special_and_unknown_ids_give_nothing(tokenizer):
    ids = tokenizer.encode("好").ids
    special = tokenizer.token_to_id("<end_of_sentence>")
    mixed = [special, *(i for token in ids for i in (token, special, 99_999))]
    assert tokenizer.decode(mixed) == "好"
    pieces, rest = stream(tokenizer, [[token] for token in mixed])
    assert "".join(pieces) + rest == "好"


def metaspace(byte_fallback=False):
    words = ["▁Hello", "▁world", "▁", "a", "b", "ing", "▁好", "!"]
    pieces = [(word, -1.0) for word in ["<unk>", *words]]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    it = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    steps = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    it.decoder = decoders.Sequence([decoders.Replace("▁", " "), *steps, decoders.Strip(" ", 1, 0)])
    if not byte_fallback:
        it.decoder = decoders.Metaspace()
    return it


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_tokenizers_of_other_kinds(byte_fallback):
    """The space of a first word is dropped by the decoder, and only that of a first word."""
    it = metaspace(byte_fallback)
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(9) for _ in range(12)]
        if byte_fallback:  # whole characters as bytes between words
            ids = [
                i for token in ids for i in (token, *(9 + b for b in rng.choice("é好🎉").encode()))
            ]
        pieces, rest = stream(it, [[token] for token in ids])
        assert "".join(pieces) + rest == it.decode(ids)
        assert sum(map(bool, pieces)) > 5
    words = Tokenizer(models.WordLevel({"w0": 0, "w1": 1}, unk_token="w0"))  # no decoder at all
    assert stream(words, [[1], [0, 1]]) == (["w1", " w0 w1"], "")


class Counted:
    """A tokenizer that counts the tokens it has decoded."""

    def __init__(self, it):
        self.it, self.tokens = it, 0

    def __getattr__(self, name):
        return getattr(self.it, name)

    def decode(self, ids):
        self.tokens += len(ids)
        return self.it.decode(ids)


def test_cost_is_linear_in_the_tokens(tokenizer):
    """Counted, not timed, for windows; byte-level text is also fast with the worst of bytes."""
    unknown = 9 + 0x80  # a byte that begins no character
    for ids in ([1, 2, 4] * 300, [unknown] * 900, [0] * 900):
        counted = Counted(metaspace(byte_fallback=True))
        stream(counted, [[token] for token in ids])
        assert counted.tokens < 30 * len(ids)
    lone = tokenizer.token_to_id("Ģ")
    began = time.perf_counter()
    pieces, rest = stream(tokenizer, [[lone]] * 20_000, stop=["\ufffd" * 255 + "x"])
    assert "".join(pieces) + rest == "\ufffd" * 20_000
    assert time.perf_counter() - began < 5


# ---------------------------------------------------------------- stop strings


def cut(whole, stops):
    """The definition: read on until some stop string is complete; cut the longest such one."""
    for end in range(len(whole) + 1):
        found = [stop for stop in stops if whole[:end].endswith(stop)]
        if found:
            return whole[: end - max(map(len, found))], True
    return whole, False


def test_stop_strings_at_every_place(tokenizer):
    ids = tokenizer.encode(SENTENCES[3] + SENTENCES[1]).ids
    whole = tokenizer.decode(ids)
    for start in range(len(whole)):
        for length in (1, 2, 5, 11):
            stop = whole[start : start + length]
            it = TextStream(tokenizer, (stop, "never there"))
            out = ""
            for token in ids:
                out += it.push([token])
                assert whole.startswith(out)
            assert out + it.finish() == whole[: whole.index(stop)]
            assert it.stopped
            assert it.push(ids) == it.finish() == ""


def test_random_stop_strings_of_few_letters():
    """Many partial matches that overlap, cut into pieces at random."""
    plain = train_tokenizer([], vocab_size=258)
    rng = random.Random(2)
    stopped = 0
    for _ in range(1500):
        whole = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 25)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 7))) for _ in range(3)]
        ids, parts = plain.encode(whole).ids, []
        while ids:
            count = rng.randrange(1, 5)
            parts.append(ids[:count])
            ids = ids[count:]
        pieces, rest = stream(plain, parts, stops)
        wanted, found = cut(whole, stops)
        assert "".join(pieces) + rest == wanted, (whole, stops)
        assert rest == "" or not found
        stopped += found
    assert 300 < stopped < 1400


def test_what_may_begin_a_stop_string_is_held_and_no_more():
    plain = train_tokenizer([], vocab_size=258)

    def push(stop, *texts):
        return stream(plain, [plain.encode(piece).ids for piece in texts], stop)

    assert push(["</end>"], "ab<", "/", "en", "x", "y") == (["ab", "", "", "</enx", "y"], "")
    assert push(["</end>"], "ab</en") == (["ab"], "</en")
    assert push(["</end>"], "ab</en", "d>", "more") == (["ab", "", ""], "")
    assert push(["aab"], "aaa", "a", "b") == (["a", "a", ""], "")
    assert push(["bc", "abcd"], "xab", "c", "d") == (["x", "a", ""], "")  # complete first


def test_a_stop_string_of_broken_bytes_at_the_end(tokenizer):
    start = train_tokenizer([], vocab_size=258)
    ids = start.encode("ok🎉").ids[:-1]
    assert stream(start, [ids], ["\ufffd"]) == (["ok"], "")
    assert stream(start, [ids], ["k\ufffdx"]) == (["o"], "k\ufffd")


# ---------------------------------------------------------------- tokenizers of others

CONFIG = small_config("ls", vocab_size=500)


def test_a_saved_tokenizer_encodes_as_it_did(tokenizer, tmp_path):
    padded = Tokenizer.from_str(tokenizer.to_str())
    padded.enable_padding(length=64)
    padded.enable_truncation(4)
    padded.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for sentence in [*SENTENCES, "", "<beginning_of_sentence>user", "\x00\x7f"]:
        wanted = tokenizer.encode(sentence).ids
        assert encode(loaded, sentence, CONFIG) == wanted
        assert decode(loaded, wanted) == tokenizer.decode(wanted)
    assert encode(loaded, "<beginning_of_sentence>", CONFIG) == [1]


def test_special_tokens_are_added_or_not(tmp_path):
    from tokenizers import processors

    it = train_tokenizer([], vocab_size=258)
    it.post_processor = processors.TemplateProcessing(
        single="<beginning_of_sentence> $A", special_tokens=[("<beginning_of_sentence>", 1)]
    )
    (plain,) = encode(it, "x", CONFIG, add_special_tokens=False)
    assert encode(it, "x", CONFIG) == [1, plain]


def test_prompts_that_are_refused(tokenizer):
    with pytest.raises(ValueError, match="the prompt has 12 bytes; it must have at most 11"):
        encode(tokenizer, "深度学习", CONFIG, max_bytes=11)
    assert encode(tokenizer, "深度学习", CONFIG, max_bytes=12)
    with pytest.raises(ValueError, match="is not Unicode text"):
        encode(tokenizer, "a\ud800b", CONFIG)
    (highest,) = encode(tokenizer, "näh 好", CONFIG)
    small = small_config("ls", vocab_size=highest)
    with pytest.raises(ValueError, match=f"gives id {highest}; ids must be below .* {highest},"):
        encode(tokenizer, "näh 好", small)
    assert encode(tokenizer, "näh 好", small_config("ls", vocab_size=highest + 1)) == [highest]
    with pytest.raises(ValueError, match="cannot decode"):
        decode(tokenizer, [-1])


def bomb():
    it = train_tokenizer([], vocab_size=258)
    it.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    return it


def test_a_pattern_that_explodes_is_refused(tmp_path, capfd):
    bomb().save(str(tmp_path / "tokenizer.json"))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"cannot encode the prompt \(.*retry-limit") as caught:
        encode(load_tokenizer(tmp_path), "a" * 200 + "b", CONFIG)
    assert time.perf_counter() - began < 30
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


def broken_files():
    good = json.loads(train_tokenizer([], vocab_size=258).to_str())
    yield "not JSON", b"not json", "not a tokenizer"
    yield "empty", b"", "not a tokenizer"
    yield "a list", b"[1]", "not a tokenizer"
    yield "deep", b"[" * 100_000, "not a tokenizer"
    yield "no model", json.dumps({**good, "model": None}).encode(), "not a tokenizer"
    bad_pattern = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated",
                   "invert": False}  # fmt: skip
    yield "pattern", json.dumps({**good, "pre_tokenizer": bad_pattern}).encode(), "not a tokenizer"
    merges = {**good["model"], "merges": [["not", "there"]]}
    yield "merges", json.dumps({**good, "model": merges}).encode(), "not a tokenizer"
    yield "latin-1", b"\xff\xfe", "tokenizer.json"


@pytest.mark.parametrize(
    ("content", "named"), [case[1:] for case in broken_files()], ids=[c[0] for c in broken_files()]
)
def test_broken_files_are_refused_in_one_line(content, named, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/tokenizer.json: ")
    assert "\n" not in message
    assert len(message) < 700


def test_files_that_are_not_read(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "it"
    folder.mkdir()
    with pytest.raises(ValueError, match="no such file; get one"):
        load_tokenizer(folder, missing="no such file; get one")
    outside = tmp_path / "tokenizer.json"
    tokenizer.save(str(outside))
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(ValueError, match="link out of the folder"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ValueError, match="at most 67,108,864 are read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_fault_of_the_tokenizer_passes(error):
    def call():
        raise error

    with pytest.raises(error):
        text._guarded(call, "it")


# ---------------------------------------------------------------- single tokens


def test_what_single_tokens_stand_for(tokenizer):
    spelling = Spelling(tokenizer)
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence).ids
        assert b"".join(map(spelling, ids)) == sentence.encode()
    assert spelling(1) == b"<beginning_of_sentence>"
    assert spelling(tokenizer.get_vocab_size()) == b""
    assert Spelling(metaspace(byte_fallback=True))(1) == b"Hello"


def test_other_threads_run_while_text_is_encoded(tokenizer):
    """Else a long prompt would stop all who are being answered."""
    gaps, done = [0.0], threading.Event()

    def watch():
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    encode(tokenizer, "".join(SENTENCES) * 2000, CONFIG)
    took = time.perf_counter() - began
    done.set()
    thread.join()
    assert max(gaps) < took / 2
