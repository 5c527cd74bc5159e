"""`chatstream chat` on a pipe and on a terminal, with a local model and with a server."""

from __future__ import annotations

import asyncio
import http.server
import io
import logging
import os
import pty
import subprocess
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import pytest

from chatstream.cli.chat import Terminal, ordinal, position_text, printable
from chatstream.engines.mock import ROUND
from chatstream.errors import EngineError
from chatstream.types import Failed, Queued, StreamEvent
from tests.cli import command
from tests.cli.command import ServerProcess, serving
from tests.cli.test_serve import one_running_one_waiting

logger = logging.getLogger("chatstream")
MOCK = ("--engine", "mock", "--mock-time-per-token", "0.001")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*MOCK, "--api-key", "secret") as process:
        yield process


# --- on a pipe ------------------------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_message_and_only_answers_are_printed() -> None:
    result = command.run("chat", *MOCK, "--mock-type", "echo", stdin="One two.\n\nThree, /four.\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "One two.\nThree, /four.\n", "")


def test_the_demo_model_answers() -> None:
    result = command.run("chat", stdin="What is a slot?\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert "slot" in result.stdout


class LoggingBackend:
    """A backend that logs a warning while it loads, and whose answer fails."""

    name = "talkative"

    async def open(self) -> None:
        logger.warning("it has no chat template")

    async def ask(self, message: str | None) -> AsyncGenerator[StreamEvent, None]:
        logger.error("a step failed", exc_info=ZeroDivisionError())
        yield Failed("r", EngineError("the step failed"))

    async def reset(self) -> None: ...

    async def close(self) -> None: ...


def test_warnings_while_loading_are_printed_and_an_error_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a process without a logging configuration.
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    with asyncio.Runner() as runner:
        assert Terminal(LoggingBackend(), runner).run() == 1
    assert capsys.readouterr().err == "it has no chat template\nchatstream: the step failed\n"


def test_a_conversation_continues_and_can_be_repeated_and_restarted() -> None:
    result = command.run("chat", *MOCK, stdin="a\nb\n/again\n/new\nc\n/quit\nd\n")
    assert result.stdout.splitlines() == [ROUND[0], ROUND[1], ROUND[1], ROUND[0]]


def test_a_server_keeps_the_conversation_too(server: ServerProcess) -> None:
    result = command.run("chat", server.url, "--api-key", "secret", stdin="a\nb\n/again\n/new\nc\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [ROUND[0], ROUND[1], ROUND[1], ROUND[0]]


def test_the_length_limit_is_sent_to_a_server(server: ServerProcess) -> None:
    env = command.environment(CHATSTREAM_API_KEY="secret", CHATSTREAM_MAX_NEW_TOKENS="3")
    assert command.run("chat", server.url, stdin="a\n", env=env).stdout == f"{' '.join(ROUND[0].split()[:3])}\n"


def test_an_unanswered_message_is_reported_in_one_line_with_status_1(server: ServerProcess) -> None:
    result = command.run("chat", server.url, stdin="a\n")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "API key" in result.stderr


def test_a_full_queue_prints_the_retry_time() -> None:
    with (
        serving("--engine", "mock", "--mock-type", "long", "--max-concurrency", "1", "--max-queue-size", "1") as full,
        one_running_one_waiting(full),
    ):
        result = command.run("chat", full.url, stdin="a\n")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "waiting; try again in " in result.stderr


def test_an_unreachable_server_is_reported_in_one_line() -> None:
    result = command.run("chat", "http://127.0.0.1:1", stdin="a\n")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "cannot reach http://127.0.0.1:1" in result.stderr


def test_a_server_of_another_kind_is_reported_in_one_line() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        result = command.run("chat", url, stdin="a\n")
        other.shutdown()
    assert (result.returncode, result.stderr) == (1, f"chatstream: there is no ChatStream server at {url}\n")


# --- on a terminal --------------------------------------------------------------------------------------------------


class Screen:
    """The user's end of a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, text: str) -> str:
        """Read up to and including this text."""
        while text not in self._unread:
            try:
                self._unread += os.read(self._terminal, 4096).decode(errors="replace")
            except OSError:  # on Linux: the other end is closed
                raise AssertionError(f"the command ended before {text!r}: {self._unread}") from None
        seen, self._unread = self._unread.split(text, 1)
        return seen + text


@contextmanager
def terminal(*arguments: str) -> Iterator[Screen]:
    ours, theirs = pty.openpty()
    # A new session with this controlling terminal, and SIGINT not ignored as in a background job, so that a typed
    # Ctrl-C reaches the command.
    process = subprocess.Popen(
        [command.COMMAND[0], "-c", _TAKE_TERMINAL, *command.COMMAND[1:], "chat", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=command.environment(),
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Screen(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


_TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_terminal_shows_the_position_while_a_request_waits() -> None:
    with (
        serving("--engine", "mock", "--mock-type", "long", "--max-concurrency", "1") as busy,
        one_running_one_waiting(busy),
        terminal(busy.url) as screen,
    ):
        screen.until("> ")
        screen.type("Hello\n")
        screen.until("You are 2nd in the queue")
        screen.type("\x03")
        screen.until("stopped")
        screen.until("> ")
        screen.type("/again\n")
        screen.until("You are 2nd in the queue")


def test_a_terminal_marks_an_estimated_position() -> None:
    with (
        serving("--engine", "mock", "--mock-type", "long", "--max-concurrency", "1", "--policy", "priority") as busy,
        one_running_one_waiting(busy),
        terminal(busy.url) as screen,
    ):
        screen.until("> ")
        screen.type("Hello\n")
        screen.until("You are about 2nd in the queue")


def test_ctrl_c_stops_the_answer_and_the_conversation_continues() -> None:
    with terminal("--engine", "mock", "--mock-type", "long", "--mock-time-per-token", "0.01") as screen:
        screen.until("> ")
        screen.type("Hello\n")
        screen.until("This answer")
        screen.type("\x03")
        screen.until("stopped")
        screen.until("> ")
        screen.type("/again\n")
        screen.until("does it exactly.")
        screen.until("> ")
        screen.type("/nonsense\n")
        screen.until("/quit or Ctrl-D quits")
        screen.until("> ")
        screen.type("\x04")
        assert screen.process.wait(30) == 0


def test_control_characters_of_a_model_are_removed() -> None:
    assert printable("a\x1b[31mb\x07\r\x9bc\td\n") == "a[31mbc\td\n"


@pytest.mark.parametrize(
    ("queued", "text"),
    [
        (Queued("r", 1), "You are next in the queue"),
        (Queued("r", 3, 12.0, 30.0), "You are 3rd in the queue, starting in about 12 s"),
        (Queued("r", 1, 0.5, 2.0, "estimate"), "You are probably next in the queue, starting in about 0.5 s"),
        (Queued("r", 3, None, None, "estimate"), "You are about 3rd in the queue"),
        (Queued("r", 1, waits_for="opening"), "You are next in the queue, waiting for the server to be ready"),
    ],
)
def test_a_position_is_shown_as_text(queued: Queued, text: str) -> None:
    assert position_text(queued) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (21, "21st"), (113, "113th")],
)
def test_ordinal_numbers(number: int, text: str) -> None:
    assert ordinal(number) == text
