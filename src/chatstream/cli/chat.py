"""`chatstream chat`: input and output of the terminal. Each answer runs in its own coroutine, which Ctrl-C cancels."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import unicodedata
from contextlib import aclosing
from typing import TYPE_CHECKING

from chatstream.cli.options import DEFAULT_MODEL, ModelOptions
from chatstream.errors import ChatStreamError, ConfigError
from chatstream.types import Done, Failed, FinishReason, Queued, Started, StreamEvent, Token

if TYPE_CHECKING:
    from rich.status import Status

    from chatstream.cli.speakers import ChatBackend

HELP = "/new starts a new conversation, /again repeats the last message, Ctrl-C stops an answer, /quit or Ctrl-D quits"


def chat(
    model: str | None = None,
    /,
    *,
    model_options: ModelOptions = DEFAULT_MODEL,
    api_key: str | None = None,
) -> int:
    """Chat in the terminal with a model in this process or with a running server.

    For example:

    ```
    chatstream chat
    chatstream chat http://127.0.0.1:8000
    echo "Hello" | chatstream chat Qwen/Qwen3-0.6B
    ```

    Each line is a message. /new starts a new conversation, /again answers the last message again, Ctrl-C stops the
    running answer, Ctrl-D or /quit quits. The exit status is 1 if a message from a pipe was not answered.

    Parameters
    ----------
    model:
        Hugging Face name, directory of a checkpoint or of an OpenVINO export, or http(s) URL of a running server.
        [default: the bundled demo model]
    api_key:
        With a URL: the server's API key.
    """
    backend = _backend(model, model_options, api_key)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with asyncio.Runner() as runner:
        return Terminal(backend, runner).run()


def _backend(model: str | None, options: ModelOptions, api_key: str | None) -> ChatBackend:
    is_url = model is not None and model.startswith(("http://", "https://"))
    if is_url:
        options.refuse_all_but("max_new_tokens", "temperature", because="cannot be set for a running server")
    elif api_key is not None:
        raise ConfigError("--api-key needs the address of a running server, such as http://127.0.0.1:8000")
    settings = {} if is_url else options.settings(model)
    from chatstream.chat_stream import ChatStream
    from chatstream.cli.speakers import LocalBackend, ServerBackend
    from chatstream.runtime import RuntimeSettings
    from chatstream.scheduler import SchedulerSettings

    if is_url:
        assert model is not None
        given = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        sampling = {name: value for name, value in given.items() if value is not None}
        return ServerBackend(model, api_key=api_key, sampling=sampling)
    # The user may pause the terminal (Ctrl-S) for any time.
    runtime = RuntimeSettings(reader_stall_timeout_s=None)
    scheduler = SchedulerSettings(stall_timeout_s=None)
    return LocalBackend(ChatStream(**settings, max_concurrency=1, runtime=runtime, scheduler=scheduler))


class Terminal:
    """Reads lines and prints answers. On a pipe it prints only the answers."""

    def __init__(self, backend: ChatBackend, runner: asyncio.Runner) -> None:
        from rich.console import Console

        self._backend = backend
        self._runner = runner
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=True, highlight=False)
        self._position: Status | None = None
        self._unanswered: str | None = None
        """The last message if it has no answer yet: the backend has not kept it."""
        self._has_failed = False
        self._is_mid_line = False
        """The cursor is not at the start of a line."""

    def run(self) -> int:
        """Chat until the input ends; return the exit status."""
        if self._is_interactive:
            import readline  # noqa: F401  # adds history and line editing to `input`

            self._hint(f"Loading {self._backend.name}")
        self._runner.run(self._backend.open())
        # From here on an error is printed as one line, so it must not be logged as well.
        logging.getLogger("chatstream").addHandler(logging.NullHandler())
        self._hint(f"Connected to {self._backend.name}. {HELP}.")
        try:
            while (line := self._read()) is not None:
                self._handle(line)
        finally:
            self._runner.run(self._backend.close())
        return 1 if self._has_failed and not self._is_interactive else 0

    def _read(self) -> str | None:
        """Return the next line that is not empty; None at the end of the input."""
        while True:
            try:
                line = input("> " if self._is_interactive else "").strip()
            except EOFError:
                if self._is_interactive:
                    print()
                return None
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                print()
                self._hint(HELP)
                continue
            if line:
                return None if line == "/quit" else line

    def _handle(self, line: str) -> None:
        try:
            if line == "/new":
                self._unanswered = None
                self._runner.run(self._backend.reset())
                self._hint("New conversation.")
            elif line == "/again":
                self._runner.run(self._answer(self._unanswered))
            elif line.startswith("/") and " " not in line and self._is_interactive:
                self._hint(HELP)
            else:
                self._runner.run(self._answer(line))
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            self._hint("stopped")
        except ChatStreamError as error:
            self._has_failed = True
            self._show_error(error)

    async def _answer(self, message: str | None) -> None:
        """Print the answer to a message; None: another answer to the last one. Raises `ChatStreamError`."""
        self._unanswered = message
        try:
            async with aclosing(self._backend.ask(message)) as events:
                async for event in events:
                    self._show(event)
        finally:
            self._show_position(None)
            if self._is_mid_line:
                print(flush=True)
                self._is_mid_line = False

    def _show(self, event: StreamEvent) -> None:
        match event:
            case Queued():
                self._show_position(event)
            case Started():
                self._show_position(None)
            case Token():
                self._unanswered = None
                print(printable(event.text) if self._is_interactive else event.text, end="", flush=True)
                self._is_mid_line = True
            case Done():
                self._unanswered = None
                self._is_mid_line = True  # end the line even after an empty answer
                if event.finish_reason is FinishReason.LENGTH:
                    self._hint(" (ended at the length limit)")
            case Failed():
                raise event.error

    def _show_position(self, queued: Queued | None) -> None:
        """Show the position in the queue on a status line; None removes the line."""
        if queued is None or not self._notes.is_terminal:
            if self._position is not None:
                self._position.stop()
                self._position = None
            return
        text = position_text(queued)
        if self._position is None:
            self._position = self._notes.status(text)
            self._position.start()
        self._position.update(text)

    def _show_error(self, error: ChatStreamError) -> None:
        message = " ".join(error.message.split())
        if error.retry_after_s is not None:
            message += f"; try again in {math.ceil(error.retry_after_s)} s"
        if self._is_interactive and self._unanswered is not None:
            message += " (/again sends it again)"
        print("chatstream:", message, file=sys.stderr)

    def _hint(self, text: str) -> None:
        if self._is_interactive:
            self._notes.print(text, style="dim", markup=False)


def printable(text: str) -> str:
    """Remove control characters, with which a model could move the cursor, colour the terminal or ring its bell."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def position_text(queued: Queued) -> str:
    """The position as a sentence, with the time until the start if there is an estimate."""
    is_exact = queued.position_kind == "exact"
    if queued.position == 1:
        rank = "next" if is_exact else "probably next"
    else:
        rank = ordinal(queued.position) if is_exact else f"about {ordinal(queued.position)}"
    eta = "" if queued.eta_seconds is None else f", starting in about {queued.eta_seconds:g} s"
    return f"You are {rank} in the queue{_WAITS_FOR.get(queued.waits_for, eta)}"


_WAITS_FOR = {
    "conversation": ", waiting for the answer to an earlier message of this conversation",
    "client_limit": ", waiting for one of your other requests to end",
    "opening": ", waiting for the server to be ready",
}


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …, 11th, …, 21st."""
    is_teen = number % 100 // 10 == 1
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
