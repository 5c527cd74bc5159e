"""Every example runs as its first lines say, and one sees what they say.

Commands are the indented lines of an example's docstring. `chatstream serve` and `uvicorn` are started on a free port
and stay while the others run; the address in the printed commands is replaced by theirs.
"""

from __future__ import annotations

import ast
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.command import environment, serving

ROOT = Path(__file__).parent.parent
URL = "http://127.0.0.1:8000"

Check = Callable[[list[str], str], None]
"""Given what each command printed, in order, and what the server did."""


def sees_fastapi_app(outputs: list[str], server: str) -> None:
    (events,) = outputs
    assert events.startswith("event: started\n")
    assert events.count("event: token\n") > 1
    assert "event: done\n" in events


def sees_original_style(outputs: list[str], server: str) -> None:
    pieces = outputs[0].split("<::EOS::>")
    assert len(pieces) > 3
    assert pieces.pop() == ""
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    assert "a request has ended: success" in server


def sees_without_http(outputs: list[str], server: str) -> None:
    lines = outputs[0].splitlines()
    assert {"'Hello' starts after 0.0 s", "'What are you?' starts after 0.0 s"} <= set(lines)
    assert "'こんにちは' is number 1 in line" in lines
    assert sum(" -> " in line for line in lines) == 3
    assert "running=0/2 waiting=0/5" in lines[-1]


def sees_openai_client(outputs: list[str], server: str) -> None:
    streamed, whole = outputs[0].splitlines()
    assert re.fullmatch(r"\S.*  \(\d+ tokens\)", streamed)
    assert whole.strip()


def sees_curl(outputs: list[str], server: str) -> None:
    for heading in ("--- events", "--- ChatStream 0.3", "--- OpenAI", "--- load"):
        assert heading in outputs[0]
    assert "event: done\n" in outputs[0]
    assert "<::EOS::>\n" in outputs[0]
    assert '"object":"chat.completion"' in outputs[0]
    assert '"processing":0,"waiting":0' in outputs[0]


def sees_many_users(outputs: list[str], server: str) -> None:
    waited_s = [float(seconds) for seconds in re.findall(r"done, waited ([\d.]+) s", outputs[0])]
    assert len(waited_s) == 5
    assert sorted(waited_s)[:2] == [0.0, 0.0]
    assert all(seconds > 0 for seconds in sorted(waited_s)[2:])
    assert outputs[0].count("Good day, and welcome") == 5


def sees_own_engine(outputs: list[str], server: str) -> None:
    assert outputs == ["the engine keeps its contract\nIS ANYBODY THERE\n"]


CHECKS: dict[str, Check] = {
    "curl.sh": sees_curl,
    "fastapi_app.py": sees_fastapi_app,
    "many_users.py": sees_many_users,
    "openai_client.py": sees_openai_client,
    "original_style.py": sees_original_style,
    "own_engine.py": sees_own_engine,
    "without_http.py": sees_without_http,
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_does_what_it_says(name: str) -> None:
    server_command, commands = split(commands_of(ROOT / "examples" / name))
    with hosting(server_command) as (url, server_output):
        outputs = [run(command.replace(URL, url)) for command in commands]
    CHECKS[name](outputs, "".join(server_output))


@pytest.mark.parametrize("name", ["many_users.py", "openai_client.py"])
def test_an_example_without_its_server_says_so_in_one_line(name: str) -> None:
    with socket.socket() as taken:  # by somebody who does not listen, so that nobody else does
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        line = [sys.executable, f"examples/{name}", url]
        done = subprocess.run(line, cwd=ROOT, env=strict_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(rf"No server answers at {url}\. Start one: chatstream serve.*\n", done.stderr)


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_is_small(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) <= 100


def commands_of(example: Path) -> list[str]:
    text = example.read_text(encoding="utf-8")
    if example.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        said = "\n".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    indented = re.findall(r"^ {4}(\S.*)$", said, re.MULTILINE)
    assert any(example.name in command or example.stem in command for command in indented), "it says how to run itself"
    return [command for command in indented if not command.startswith("pip install ")]


def split(commands: list[str]) -> tuple[str, list[str]]:
    """The server, empty when there is none, and the others."""
    is_server = commands[0].startswith(("chatstream serve", "uvicorn "))
    return (commands[0], commands[1:]) if is_server else ("", commands)


@contextmanager
def hosting(command: str) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it printed, complete after the block."""
    program, *arguments = shlex.split(command) or [""]
    if program == "chatstream":
        # Ten times as fast as people read.
        pace = ["--mock-time-per-token", "0.01"] if "mock" in arguments else []
        with serving(*arguments[1:], *pace) as server:
            yield server.url, []
    elif program == "uvicorn":
        with uvicorn(*arguments) as hosted:
            yield hosted
    else:
        yield "", []


@contextmanager
def uvicorn(*arguments: str) -> Iterator[tuple[str, list[str]]]:
    line = [sys.executable, "-m", "uvicorn", "--port", "0", *arguments]
    both: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    printed: list[str] = []
    with subprocess.Popen(line, cwd=ROOT, env=strict_environment(), text=True, **both) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        try:
            url = None
            while url is None:
                printed.append(process.stdout.readline())
                assert printed[-1], "".join(printed)
                url = re.search(r"running on (http://\S+)", printed[-1])
            yield url[1], printed
        finally:
            process.terminate()
            printed += process.stdout.readlines()


def run(command: str) -> str:
    if command.startswith("python "):
        command = f"{shlex.quote(sys.executable)} {command.removeprefix('python ')}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=strict_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def strict_environment() -> dict[str, str]:
    """Warnings are errors in examples too: nobody is to copy what is deprecated."""
    return environment(PYTHONWARNINGS="error")
