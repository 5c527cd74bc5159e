"""Every example runs as its docstring describes and prints what the docstring promises.

Commands are the indented lines of an example's docstring. `chatstream serve` and `uvicorn` are started on a free port
and run until the other commands have ended; the address in those commands is replaced by the server's.
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
"""Arguments: the output of each command, in order, and the output of the server."""


def check_fastapi_app(outputs: list[str], server: str) -> None:
    (events,) = outputs
    assert events.startswith("event: started\n")
    assert events.count("event: token\n") > 1
    assert "event: done\n" in events


def check_original_style(outputs: list[str], server: str) -> None:
    pieces = outputs[0].split("<::EOS::>")
    assert len(pieces) > 3
    assert pieces.pop() == ""
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    assert "a request has ended: success" in server


def check_without_http(outputs: list[str], server: str) -> None:
    lines = outputs[0].splitlines()
    assert {"'Hello' starts after 0.0 s", "'What are you?' starts after 0.0 s"} <= set(lines)
    assert "'こんにちは' waits at position 1" in lines
    assert sum(" -> " in line for line in lines) == 3
    assert "running=0/2 waiting=0/5" in lines[-1]


def check_openai_client(outputs: list[str], server: str) -> None:
    streamed, whole = outputs[0].splitlines()
    assert re.fullmatch(r"\S.*  \(\d+ tokens\)", streamed)
    assert whole.strip()


def check_curl(outputs: list[str], server: str) -> None:
    for heading in ("--- events", "--- ChatStream 0.3", "--- OpenAI", "--- load"):
        assert heading in outputs[0]
    assert "event: done\n" in outputs[0]
    assert "<::EOS::>\n" in outputs[0]
    assert '"object":"chat.completion"' in outputs[0]
    assert '"processing":0,"waiting":0' in outputs[0]


def check_many_users(outputs: list[str], server: str) -> None:
    waited_s = [float(seconds) for seconds in re.findall(r"done, waited ([\d.]+) s", outputs[0])]
    assert len(waited_s) == 5
    assert sorted(waited_s)[:2] == [0.0, 0.0]
    assert all(seconds > 0 for seconds in sorted(waited_s)[2:])
    assert outputs[0].count("Good day, and welcome") == 5


def check_own_engine(outputs: list[str], server: str) -> None:
    assert outputs == ["the engine fulfils its contract\nIS ANYBODY THERE\n"]


CHECKS: dict[str, Check] = {
    "curl.sh": check_curl,
    "fastapi_app.py": check_fastapi_app,
    "many_users.py": check_many_users,
    "openai_client.py": check_openai_client,
    "original_style.py": check_original_style,
    "own_engine.py": check_own_engine,
    "without_http.py": check_without_http,
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_prints_what_its_docstring_promises(name: str) -> None:
    server_command, commands = split(commands_of(ROOT / "examples" / name))
    with hosting(server_command) as (url, server_output):
        outputs = [run(command.replace(URL, url)) for command in commands]
    CHECKS[name](outputs, "".join(server_output))


@pytest.mark.parametrize("name", ["many_users.py", "openai_client.py"])
def test_an_example_without_a_server_ends_with_a_one_line_error(name: str) -> None:
    with socket.socket() as taken:  # bound but not listening, so connections are refused
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
        docstring = ast.get_docstring(ast.parse(text)) or ""
    else:
        docstring = "\n".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    indented = re.findall(r"^ {4}(\S.*)$", docstring, re.MULTILINE)
    assert any(example.name in command or example.stem in command for command in indented), "no command runs it"
    return [command for command in indented if not command.startswith("pip install ")]


def split(commands: list[str]) -> tuple[str, list[str]]:
    """The command that starts a server (empty if there is none), and the other commands."""
    is_server = commands[0].startswith(("chatstream serve", "uvicorn "))
    return (commands[0], commands[1:]) if is_server else ("", commands)


@contextmanager
def hosting(command: str) -> Iterator[tuple[str, list[str]]]:
    """Run a server. Yields its address and its output, which is complete after the block."""
    program, *arguments = shlex.split(command) or [""]
    if program == "chatstream":
        # Ten times the default pace.
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
    """Warnings are errors in examples too: an example must not use deprecated APIs."""
    return environment(PYTHONWARNINGS="error")
