"""`Steered`: a scripted engine that runs in a child process and is controlled by its prompts and by files in a
folder."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from chatstream.engines.base import Capacity, EngineHealth
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.process import ProcessEngine
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    Message,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    Usage,
)
from tests.engines.batching.scripted import ScriptedRunner, counting, scripted_engine

logger = logging.getLogger("chatstream.steered")


class Steered:
    """A prompt is a list of commands: a number generates that many tokens; any other word runs that command if a file
    of that name exists in the folder.

    The text of each token is the number of tokens that all generations made before it, and a space. The engine removes
    a file when it has run the command; with "block" and "loading" it waits until the test removes the file.
    """

    model_name = "steered"
    default_sampling = SamplingParams(max_new_tokens=7)

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._detail = "not started"
        self._num_made = 0
        self.capacity = Capacity(context_len=10)

    async def start(self) -> None:
        self._detail = "loading: reading, 43%"
        await self._until_removed("loading")
        if self._has_file("load fails"):
            raise ConfigError("no such checkpoint")
        if self._has_file("load breaks"):
            raise ZeroDivisionError("division by zero")
        if self._has_file("load dies", keep=True):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._has_file("load freezes"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._has_file("load orphans", keep=True):
            wait_gone = ("sh", "-c", 'while [ -e "$0" ]; do sleep 0.1; done', str(self._folder / "load orphans"))
            subprocess.Popen(wait_gone, close_fds=False)  # noqa: ASYNC220 - it inherits the child's end of the connection
            os.kill(os.getpid(), signal.SIGSEGV)
        self.capacity = Capacity(4 if self._has_file("shrink") else 8, context_len=1000)
        self._detail = ""

    async def stop(self) -> None:
        if self._has_file("stop hangs"):
            await asyncio.Event().wait()
        if self._has_file("stop breaks"):
            raise ZeroDivisionError("division by zero")
        self._detail = "stopped"

    def health(self) -> EngineHealth:
        return EngineHealth(not self._detail, self._detail)

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        assert not isinstance(prompt, str)
        if prompt[-1].content == "refused":
            raise InvalidRequest("the template refuses this", param="messages", retry_after_s=None)
        if prompt[-1].content == "unpicklable":
            return PreparedPrompt(messages=(Message("user", unpicklable()),))
        return PreparedPrompt(messages=prompt)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        num_tokens = 0
        if not request.prompt.messages[-1].content:
            raise ValueError("at least one command is needed")
        for command in request.prompt.messages[-1].content.split():
            if command.isdigit():
                for _ in range(int(command)):
                    await asyncio.sleep(0)
                    num_tokens += 1
                    self._num_made += 1
                    yield TokenDelta(f"{self._num_made - 1} ")
            elif command == "unpicklable":
                yield TokenDelta(unpicklable())
            elif command == "unloadable":
                yield TokenDelta(unloadable())
            elif self._has_file(command, keep=command == "block"):
                await self._run(command)
        yield TokenDelta("", 0, FinishReason.STOP, Usage(1, num_tokens))

    async def _run(self, command: str) -> None:
        match command:
            case "block":
                (self._folder / "blocked").touch()
                await self._until_removed("block")
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "warn":
                logger.warning("a warning of %s", self.model_name)

    async def _until_removed(self, name: str) -> None:
        await until(lambda: not self._has_file(name, keep=True))

    def _has_file(self, name: str, *, keep: bool = False) -> bool:
        file = self._folder / name
        if not file.exists():
            return False
        if not keep:
            file.unlink()
        return True


def unpicklable() -> str:
    """A string that cannot be pickled."""

    class Local(str):
        __slots__ = ()

    return Local("text")


def unloadable() -> str:
    """A string that can be pickled, of a class that the parent process cannot import."""
    kind = type("Text", (str,), {"__module__": "__main__"})
    vars(sys.modules["__main__"])["Text"] = kind
    text: str = kind("text")
    return text


def steered(folder: Path, **options: Any) -> ProcessEngine:
    return ProcessEngine(partial(Steered, str(folder)), **options)


def batched() -> StepEngine:
    """A `StepEngine`, which generates ahead of its readers, in a thread."""
    return scripted_engine(ScriptedRunner())


def hanging_once(folder: str) -> StepEngine:
    """A `StepEngine` that hangs at the third token of an answer if the file `hang` exists; it removes the file
    first."""

    def rule(prompt: tuple[int, ...], n: int) -> int:
        if n == 2 and (file := Path(folder) / "hang").exists():
            file.unlink()
            threading.Event().wait()
        return counting(prompt, n)

    return scripted_engine(ScriptedRunner(rule), step_timeout_s=0.5)


@asynccontextmanager
async def running(engine: Path | ProcessEngine, **options: Any) -> AsyncIterator[ProcessEngine]:
    if isinstance(engine, Path):
        engine = steered(engine, **options)
    async with asyncio.timeout(60):  # a hang is a failure
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()


async def request(engine: ProcessEngine, commands: str, request_id: str = "r") -> GenerationRequest:
    sampling = SamplingParams()
    return GenerationRequest(request_id, await engine.prepare((Message("user", commands),), sampling), sampling)


async def generate(engine: ProcessEngine, commands: str, request_id: str = "r") -> list[TokenDelta]:
    return [delta async for delta in engine.stream(await request(engine, commands, request_id))]


def numbers(deltas: list[TokenDelta]) -> list[int]:
    """For each token, the number of tokens that all generations made before it."""
    return [int(number) for delta in deltas for number in delta.text.split()]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.002)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
