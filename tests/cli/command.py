"""The command `chatstream`, run as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

COMMAND = (sys.executable, "-W", "error", "-m", "chatstream")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without ChatStream options and proxies, for a terminal of 120 columns."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CHATSTREAM_") and not k.lower().endswith("_proxy")}
    return kept | {"TERM": "xterm", "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **variables}


def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, env=env or environment(), capture_output=True, text=True, timeout=60
    )


@dataclass
class ServerProcess:
    """A process of `chatstream serve`, or of a program that serves."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    """Lines printed on stdout."""

    def send(self, signal_number: signal.Signals) -> None:
        self.process.send_signal(signal_number)

    def wait(self) -> int:
        return self.process.wait(timeout=30)

    def stderr(self) -> str:
        """Return the whole stderr. Call it after `wait`."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30.0, trust_env=False)


@contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start a server on a free port and wait until it is ready."""
    command = [*COMMAND, "serve", "--port", "0", *arguments]
    with _process(command, env or environment()) as process:
        server = ServerProcess(process, "", [])
        while "/v1 " not in (line := read_line(process)):
            server.lines.append(line)
        server.lines.append(line)
        server.url = next(line.split()[-1] for line in server.lines if "chat page" in line).rstrip("/")
        yield server


@contextmanager
def running(program: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a Python program whose stdin is a pipe."""
    with _process([sys.executable, "-W", "error", str(program), *arguments], environment()) as process:
        yield process


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise AssertionError(f"the process ended with status {process.wait(10)}: {process.stderr.read()}")
    return line


@contextmanager
def _process(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
