"""The corpus that needs no network: the user's own Python standard library and generated text.

Four sources: `stdlib-code` (about 12 MB), `stdlib-docstrings`, `pydoc-topics` (the language
reference that `help()` shows) and `synthetic` (sums and facts to be found again in long text).
Nothing is shipped; everything is read from the interpreter that runs. A file and its docstrings
are in the same split.
"""

import ast
import hashlib
import importlib.util
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmx.data.documents import Document, Unit

SOURCES = ("pydoc-topics", "stdlib-code", "stdlib-docstrings", "synthetic")

_LEFT_OUT = {"__pycache__", "_bundled", "dist-packages", "idle_test", "site-packages", "test",
             "tests"}  # fmt: skip
_SYNTHETIC_UNITS, _SYNTHETIC_DOCUMENTS, _SYNTHETIC_BYTES = 8, 120, 160_000
# fmt: off
WORDS = (
    "the", "a", "one", "old", "new", "small", "river", "house", "garden", "table", "letter",
    "winter", "road", "stone", "window", "bird", "morning", "paper", "field", "quiet", "green",
    "long", "kept", "found", "wrote", "carried", "watched", "opened", "near", "under", "behind",
    "across", "before", "after", "with", "without", "and", "but", "while", "until",
)
PLACES = (
    "London", "Lima", "Oslo", "Quito", "Cairo", "Delhi", "Tokyo", "Paris", "Rome", "Accra",
    "Dakar", "Hanoi", "Perth", "Turin", "Bergen", "Porto",
)
# fmt: on


def find_embedded() -> list[Unit]:
    """Units of the embedded corpus, in an order that depends on the interpreter's files only.

    An interpreter without source files (zipped or stripped) gives fewer sources and a warning.
    """
    root = Path(os.__file__).parent
    files = [file for file in sorted(root.rglob("*.py")) if _wanted(file.relative_to(root))]
    topics = importlib.util.find_spec("pydoc_data.topics")
    reference = Path(topics.origin) if topics and topics.origin else None
    missing = [] if files else ["stdlib-code", "stdlib-docstrings"]
    units = []
    for source in ("stdlib-code", "stdlib-docstrings"):
        units += [_unit(source, file, file.relative_to(root).as_posix()) for file in files]
    if reference is not None and reference.is_file():
        units.append(_unit("pydoc-topics", reference, "pydoc_data/topics.py"))
    else:
        missing.append("pydoc-topics")
    for number in range(_SYNTHETIC_UNITS):
        name = f"synthetic/{number}"
        units.append(Unit("synthetic", "", name, "synthetic", number, 0, _SYNTHETIC_BYTES, 0))
    if missing:
        warnings.warn(f"{root}: no text there for {', '.join(missing)}; going on", stacklevel=2)
    return units


def read_embedded(unit: Unit) -> Iterator[Document]:
    """The documents of a unit of `find_embedded`."""
    if unit.kind == "synthetic":
        yield from _synthetic(unit)
        return
    try:
        data = Path(unit.path).read_bytes()
        text = data.decode("utf-8-sig")
        tree = None if unit.kind == "stdlib-code" else _syntax(text)
    except (UnicodeDecodeError, SyntaxError):  # a file in another encoding; a template
        return
    if tree is None:
        yield Document(text, unit.source, unit.name, data)
    elif unit.kind == "stdlib-docstrings":
        found = "\n\n".join(_docstrings(tree, unit.name.removesuffix(".py").replace("/", ".")))
        yield Document(found, unit.source, unit.name, data)
    else:
        for name, topic in _topics(tree):
            yield Document(topic, unit.source, name, topic.encode())


def _wanted(file: Path) -> bool:
    return not _LEFT_OUT & set(file.parts) and file.parts[0] != "pydoc_data"


def _unit(source: str, file: Path, name: str) -> Unit:
    status = file.stat()
    modified, size = status.st_mtime_ns, status.st_size
    # Docstrings are about a seventh of the code.
    weight = size // 7 if source == "stdlib-docstrings" else size
    return Unit(source, str(file), name, source, 0, size, weight, modified)


def _syntax(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the library's own strings
        return ast.parse(text)


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    def below(node: ast.AST, name: str) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield f"{name}\n{found}"
            for child in node.body:
                yield from below(child, f"{name}.{getattr(child, 'name', '')}")

    yield from below(tree, module)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The dictionary literal of `pydoc_data/topics.py`, read without running it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for name, topic in ast.literal_eval(node).items():
                yield f"pydoc_data/topics.py:{name}", topic
            return


# ---------------------------------------------------------------- generated text


def _synthetic(unit: Unit) -> Iterator[Document]:
    """Two thirds sums, one third facts to be found again, of 1,000 to 30,000 characters."""
    draw = random.Random(f"mmx synthetic {unit.start}").random  # alike in all Python versions
    for number in range(_SYNTHETIC_DOCUMENTS):
        if number % 3:
            text = "".join(_sum(draw) for _ in range(8 + int(draw() * 24)))
        else:
            text = _needles(draw, int(1000 * 30 ** (draw() ** 3)))
        key = hashlib.sha256(text.encode()).digest()
        yield Document(text, unit.source, f"{unit.name}:{number}", key)


def _sum(draw: Callable[[], float]) -> str:
    digits = 10 ** (1 + int(draw() * 3))
    a, b = int(draw() * digits), int(draw() * digits)
    return f"{a}+{b}={a + b}\n" if draw() < 0.6 else f"{max(a, b)}-{min(a, b)}={abs(a - b)}\n"


def _needles(draw: Callable[[], float], characters: int) -> str:
    def one_of(words: Sequence[str]) -> str:
        return words[int(draw() * len(words))]

    lines, size, facts = [], 0, {}
    while size < characters:
        if draw() < 0.06 and len(facts) < len(PLACES):
            place, number = one_of(PLACES), 1000 + int(draw() * 9000)
            facts.setdefault(place, number)
            line = f"The number of {place} is {facts[place]}."
        else:
            line = " ".join(one_of(WORDS) for _ in range(6 + int(draw() * 8))).capitalize() + "."
        lines.append(line)
        size += len(line) + 1
    questions = [f"What is the number of {p}? It is {n}." for p, n in sorted(facts.items())]
    return "\n".join([*lines, *questions]) + "\n"
