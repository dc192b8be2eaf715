"""The processes in which chat templates are rendered: kept, ended, replaced."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_chat import LOOP, WHOLE, fails, render

from mmx.inference import chat_process


def workers():
    """Ids of the processes that render, and of their forks."""
    listings = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    assert listings
    found = set()
    for child in " ".join(listings).split():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if "chat_worker" in Path(f"/proc/{child}/cmdline").read_text():
                forks = Path(f"/proc/{child}/task/{child}/children").read_text().split()
                found |= {int(child), *map(int, forks)}
    return found


def there(process):
    """Whether it is, as more than a number that nobody has asked for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_is_kept_and_renders_each_template_in_a_fork():
    render(WHOLE)
    kept = workers()
    for _ in range(20):
        render(WHOLE)
    fails("{{ 'x' * 2 * 10 ** 9 }}", "too much memory")
    fails("{{ 'x' | center(10 ** 11) }}", "too much memory")
    assert workers() == kept != set()
    assert render("{% set messages = 3 %}{{ messages }}") == "3"
    assert render(WHOLE).startswith("system:Be brief.;")


FORGED = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import chat_worker
def render(template, variables, most):
    os.write(4 if template == "pipe" else 1, b"forged\\nforged\\n")
    return "rendered"
chat_worker.render = render
chat_worker.main()
"""


def test_a_fork_answers_its_own_question_and_no_other():
    """Whatever it writes, and wherever: an answer is one line, and so is the code after it."""
    ask = {"variables": {}, "most": 10, "memory": 1 << 33, "seconds": 5}
    questions = [{**ask, "template": template} for template in ("stdout", "pipe", "pipe")]
    done = subprocess.run(
        [sys.executable, "-c", FORGED, chat_process._WORKER],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "ready"
    assert len(lines) == 1 + 2 * len(questions)
    assert all(code.lstrip("-").isdigit() for code in lines[2::2])
    assert "forged" not in lines[1]


def test_no_process_is_left_behind():
    render(WHOLE)
    seen = set()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        failing = pool.submit(fails, LOOP, "takes more than 0.5 seconds", seconds=0.5)
        while not failing.done():
            now = workers()
            seen = max(seen, now, key=len)
            time.sleep(0.02)
        failing.result()
    idle = workers()
    gone = seen - idle
    assert len(gone) == 2  # the process and its fork
    until = time.perf_counter() + 10
    while any(map(there, gone)):
        assert time.perf_counter() < until
        time.sleep(0.01)
    assert render(WHOLE).startswith("system:Be brief.;")


def test_a_process_that_was_ended_is_replaced():
    render(WHOLE)
    for process in workers():
        os.kill(process, signal.SIGKILL)
    assert render(WHOLE).startswith("system:Be brief.;")


def test_processes_that_render_end_with_this_one():
    program = (
        "from mmx.inference.chat import ChatTemplate, render_chat\n"
        "from mmx.inference import chat_process\n"
        "render_chat(ChatTemplate('x'), [{'role': 'user', 'content': 'x'}])\n"
        "print(chat_process._idle[0]._process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stderr == b""
    until = time.perf_counter() + 10
    while there(int(done.stdout)):
        assert time.perf_counter() < until
        time.sleep(0.01)
