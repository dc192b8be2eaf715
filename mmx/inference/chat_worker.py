"""Renders one chat template: a program of its own, since templates are programs of others.

Reads JSON objects from stdin, a line each (template, variables, most, seconds, memory), and writes
for each {"text": ...} or {"error": ...} and the exit code of the fork that rendered it.
`mmx.inference.chat_process` starts it by its path, isolated, so it imports nothing of mmx.

The sandbox of jinja2 keeps a template away from everything but its variables; time and memory are
bounded by the operating system, which also ends what no sandbox sees, as one sum of a thousand long
strings.
"""

import json
import os
import resource
import sys
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what jinja2's own sandbox would render as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"reaches for {attribute!r} of a {type(obj).__name__}")


class Refused(TemplateError):
    """A template says itself that it does not take these messages."""


def render(template: str, variables: dict[str, Any], most: int) -> str:
    """The text of a template, with the names and settings that published templates count on."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _to_json
    tree = environment.parse(template)
    if _wants_parts(tree):
        variables["messages"] = [_in_parts(message) for message in variables["messages"]]
    else:
        variables["messages"] = [_in_one(message) for message in variables["messages"]]
    pieces, size = [], 0
    for piece in environment.from_string(tree).generate(variables):
        size += len(piece)
        if size > most:
            raise ValueError(f"more than {most:,} characters come out of it")
        pieces.append(piece)
    return "".join(pieces)


def _wants_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through the content of a message, or takes its first part."""
    loops = [loop.iter for loop in tree.find_all(nodes.For)]
    loops += [item.node for item in tree.find_all(nodes.Getitem) if _is_number(item.arg)]
    for node in loops:
        while isinstance(node, nodes.Filter):
            node = node.node  # as in `for part in message.content | selectattr(...)`
        by_name = isinstance(node, nodes.Getattr) and node.attr == "content"
        by_key = isinstance(node, nodes.Getitem) and (
            isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        )
        if by_name or by_key:
            return True
    return False


def _is_number(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


def _in_one(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {**message, "content": text}


def _raise(message: object) -> None:
    raise Refused(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def main() -> None:
    """Answer questions, each in a fork, until there are no more.

    The fork answers through a pipe of its own and ends, or is ended; its answer and its exit code
    are a line each. It has neither our input nor our output, so that nothing of it, whatever it
    does, can be taken for the answer to another question.
    """
    _write(b"ready\n")
    while line := sys.stdin.buffer.readline():
        answers, answer = os.pipe()
        process = os.fork()
        if not process:
            try:
                for ours in (0, 1, answers):
                    os.close(ours)
                _answer(json.loads(line), answer)
            finally:
                os._exit(1)
        os.close(answer)
        with open(answers, "rb") as pipe:
            said = pipe.read().replace(b"\n", b" ")
        _, status = os.waitpid(process, 0)
        _write(b"%s\n%d\n" % (said, os.waitstatus_to_exitcode(status)))


def _answer(asked: dict[str, Any], pipe: int) -> NoReturn:
    """Answer one question and end."""
    # Everything that is needed is loaded by now: no file may be written, and few opened.
    for limit, value in [
        (resource.RLIMIT_AS, asked["memory"]),
        (resource.RLIMIT_CPU, asked["seconds"] + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]:
        resource.setrlimit(limit, (value, value))
    try:
        answer = {"text": render(asked["template"], asked["variables"], asked["most"])}
    except MemoryError:
        answer = {"error": "needs too much memory"}
    except RecursionError:
        answer = {"error": "nested too deep"}
    except Exception as error:  # whatever a template can make Python raise
        answer = {"error": f"{type(error).__name__}: {str(error)[:1000]}", "kind": _kind(error)}
    with open(pipe, "wb") as answers:
        answers.write(json.dumps(answer).encode())
    os._exit(0)


def _kind(error: Exception) -> str:
    """Whose fault it is: of the messages it may be, or of the template whatever the messages."""
    if isinstance(error, Refused):
        return "refused"
    return "undefined" if isinstance(error, UndefinedError) else "failed"


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
