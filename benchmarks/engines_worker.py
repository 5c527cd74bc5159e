"""Runs a part of the benchmark in its own process, possibly with another Python, over its standard streams.

A part is a context manager `part(**options)` that yields a function `answer(**question)`. Arguments and results are
JSON values. The process is idle between two questions.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Worker:
    """The parent's side of a worker. A failure raises `RuntimeError` with the last lines of its log."""

    def __init__(
        self, part: str, log: Path, options: Mapping[str, Any], *, python: str, environment: Mapping[str, str]
    ) -> None:
        """Start the process without waiting; call `wait_open` next.

        `part` is module:function; `environment` extends the environment of this process.
        """
        self._log = log
        self._name = part
        command = [python, __file__, part, json.dumps(dict(options))]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_open(self) -> None:
        self._receive()

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `_receive` reports the reason from the log
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended: {self._log.read_text()[-1500:]}")
        return json.loads(line)


def main() -> None:
    # Keep the output of libraries away from the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    with getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2])) as answer:
        print("null", file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
