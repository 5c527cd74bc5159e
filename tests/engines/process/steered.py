"""An engine that lives in a child process and does what its prompts and the files of a folder say."""

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
    """A prompt is a list of things to do: make so many tokens, or what a file of that name allows.

    Each token is the number of those that all generations have made before it, and a space. A file is taken away when
    it was obeyed, except "hold" and "loading": there it waits for somebody else to take it away.
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
        await self._until_gone("loading")
        if self._is_told("load fails"):
            raise ConfigError("no such checkpoint")
        if self._is_told("load breaks"):
            raise ZeroDivisionError("division by zero")
        if self._is_told("load dies", keep=True):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._is_told("load freezes"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._is_told("load orphans", keep=True):
            wait_gone = ("sh", "-c", 'while [ -e "$0" ]; do sleep 0.1; done', str(self._folder / "load orphans"))
            subprocess.Popen(wait_gone, close_fds=False)  # noqa: ASYNC220 - it has our end of the connection
            os.kill(os.getpid(), signal.SIGSEGV)
        self.capacity = Capacity(4 if self._is_told("shrink") else 8, context_len=1000)
        self._detail = ""

    async def stop(self) -> None:
        if self._is_told("deaf"):
            await asyncio.Event().wait()
        if self._is_told("stop breaks"):
            raise ZeroDivisionError("division by zero")
        self._detail = "stopped"

    def health(self) -> EngineHealth:
        return EngineHealth(not self._detail, self._detail)

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        assert not isinstance(prompt, str)
        if prompt[-1].content == "unspeakable":
            raise InvalidRequest("the template refuses this", param="messages", retry_after_s=None)
        if prompt[-1].content == "unsendable":
            return PreparedPrompt(messages=(Message("user", unsendable()),))
        return PreparedPrompt(messages=prompt)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        num_tokens = 0
        if not request.prompt.messages[-1].content:
            raise ValueError("at least one thing to do")
        for what in request.prompt.messages[-1].content.split():
            if what.isdigit():
                for _ in range(int(what)):
                    await asyncio.sleep(0)
                    num_tokens += 1
                    self._num_made += 1
                    yield TokenDelta(f"{self._num_made - 1} ")
            elif what == "mumble":
                yield TokenDelta(unsendable())
            elif what == "babble":
                yield TokenDelta(unreadable())
            elif self._is_told(what, keep=what == "hold"):
                await self._do(what)
        yield TokenDelta("", 0, FinishReason.STOP, Usage(1, num_tokens))

    async def _do(self, what: str) -> None:
        match what:
            case "hold":
                (self._folder / "held").touch()
                await self._until_gone("hold")
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "warn":
                logger.warning("a warning of %s", self.model_name)

    async def _until_gone(self, what: str) -> None:
        await until(lambda: not self._is_told(what, keep=True))

    def _is_told(self, what: str, *, keep: bool = False) -> bool:
        file = self._folder / what
        if not file.exists():
            return False
        if not keep:
            file.unlink()
        return True


def unsendable() -> str:
    """A text that cannot be pickled."""

    class Local(str):
        __slots__ = ()

    return Local("text")


def unreadable() -> str:
    """A text of a class that no other process knows."""
    kind = type("Text", (str,), {"__module__": "__main__"})
    vars(sys.modules["__main__"])["Text"] = kind
    text: str = kind("text")
    return text


def steered(folder: Path, **options: Any) -> ProcessEngine:
    return ProcessEngine(partial(Steered, str(folder)), **options)


def lettered() -> StepEngine:
    """One that generates ahead of its readers, in a thread."""
    return scripted_engine(ScriptedRunner())


def stuck(folder: str) -> StepEngine:
    """One whose third token of an answer never comes, once, where a file says so."""

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


async def request(engine: ProcessEngine, what: str, request_id: str = "r") -> GenerationRequest:
    sampling = SamplingParams()
    return GenerationRequest(request_id, await engine.prepare((Message("user", what),), sampling), sampling)


async def generate(engine: ProcessEngine, what: str, request_id: str = "r") -> list[TokenDelta]:
    return [delta async for delta in engine.stream(await request(engine, what, request_id))]


def numbers(deltas: list[TokenDelta]) -> list[int]:
    """When each token was made, counted in tokens of all."""
    return [int(number) for delta in deltas for number in delta.text.split()]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.002)


def is_alive(pid: int) -> bool:
    """Not even a zombie counts."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
