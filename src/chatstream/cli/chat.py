"""`chatstream chat`: what is typed and what is shown. One coroutine an answer, so that Ctrl-C ends just that."""

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

    from chatstream.cli.speakers import Speaker

HELP = "/new begins a new conversation, /again answers again, Ctrl-C stops an answer, /quit or Ctrl-D ends"


def chat(
    model: str | None = None,
    /,
    *,
    model_options: ModelOptions = DEFAULT_MODEL,
    api_key: str | None = None,
) -> int:
    """Talk in the terminal, to a model in this process or to a running server.

    For example:

    ```
    chatstream chat
    chatstream chat http://127.0.0.1:8000
    echo "Hello" | chatstream chat Qwen/Qwen3-0.6B
    ```

    Each line is a message. /new begins a new conversation, /again answers the last message again, Ctrl-C stops the
    running answer, Ctrl-D or /quit ends. The status is 1 when a message from a pipe was not answered.

    Parameters
    ----------
    model:
        A Hugging Face name, a checkpoint directory or one exported for OpenVINO, or the http(s) address of a running
        server.
        [default: the bundled demo model]
    api_key:
        With an address: the bearer token that the server asks for.
    """
    speaker = _speaker(model, model_options, api_key)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with asyncio.Runner() as runner:
        return Terminal(speaker, runner).run()


def _speaker(model: str | None, options: ModelOptions, api_key: str | None) -> Speaker:
    is_url = model is not None and model.startswith(("http://", "https://"))
    if is_url:
        options.refuse_all_but("max_new_tokens", "temperature", because="cannot be chosen for a running server")
    elif api_key is not None:
        raise ConfigError("--api-key needs the address of a running server, such as http://127.0.0.1:8000")
    settings = {} if is_url else options.settings(model)
    from chatstream.chat_stream import ChatStream
    from chatstream.cli.speakers import ModelSpeaker, ServerSpeaker
    from chatstream.runtime import RuntimeSettings
    from chatstream.scheduler import SchedulerSettings

    if is_url:
        assert model is not None
        given = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        sampling = {name: value for name, value in given.items() if value is not None}
        return ServerSpeaker(model, api_key=api_key, sampling=sampling)
    # A terminal may be paused (Ctrl-S) for as long as its user likes.
    runtime = RuntimeSettings(reader_stall_timeout_s=None)
    scheduler = SchedulerSettings(stall_timeout_s=None)
    return ModelSpeaker(ChatStream(**settings, max_concurrency=1, runtime=runtime, scheduler=scheduler))


class Terminal:
    """Reads lines, shows answers. On a pipe it shows the answers and nothing else."""

    def __init__(self, speaker: Speaker, runner: asyncio.Runner) -> None:
        from rich.console import Console

        self._speaker = speaker
        self._runner = runner
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=True, highlight=False)
        self._place: Status | None = None
        self._unanswered: str | None = None
        """What was said last, if it was refused: the speaker does not know it."""
        self._has_failed = False
        self._is_mid_line = False
        """The cursor is not at the beginning of a line."""

    def run(self) -> int:
        """Talk until there is no more input; the exit status."""
        if self._is_interactive:
            import readline  # noqa: F401  # gives `input` its history and its line editing

            self._hint(f"Loading {self._speaker.name}")
        self._runner.run(self._speaker.open())
        # From now on a failure is shown as one line; the log's version of it would come in between.
        logging.getLogger("chatstream").addHandler(logging.NullHandler())
        self._hint(f"Talking to {self._speaker.name}. {HELP}.")
        try:
            while (line := self._read()) is not None:
                self._obey(line)
        finally:
            self._runner.run(self._speaker.close())
        return 1 if self._has_failed and not self._is_interactive else 0

    def _read(self) -> str | None:
        """The next line that is not empty; None at the end."""
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

    def _obey(self, line: str) -> None:
        try:
            if line == "/new":
                self._unanswered = None
                self._runner.run(self._speaker.forget())
                self._hint("A new conversation.")
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

    async def _answer(self, said: str | None) -> None:
        """Show an answer to what was said, or another one to the last message. Raises `ChatStreamError`."""
        self._unanswered = said
        try:
            async with aclosing(self._speaker.ask(said)) as events:
                async for event in events:
                    self._show(event)
        finally:
            self._show_place(None)
            if self._is_mid_line:
                print(flush=True)
                self._is_mid_line = False

    def _show(self, event: StreamEvent) -> None:
        match event:
            case Queued():
                self._show_place(event)
            case Started():
                self._show_place(None)
            case Token():
                self._unanswered = None
                print(printable(event.text) if self._is_interactive else event.text, end="", flush=True)
                self._is_mid_line = True
            case Done():
                self._unanswered = None
                self._is_mid_line = True  # an answer has a line of its own, also an empty one
                if event.finish_reason is FinishReason.LENGTH:
                    self._hint(" (ended by the length limit)")
            case Failed():
                raise event.error

    def _show_place(self, queued: Queued | None) -> None:
        """The place in line, on one line that goes when the answer comes."""
        if queued is None or not self._notes.is_terminal:
            if self._place is not None:
                self._place.stop()
                self._place = None
            return
        text = position_text(queued)
        if self._place is None:
            self._place = self._notes.status(text)
            self._place.start()
        self._place.update(text)

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
    """What a model says must not move the cursor, colour the terminal or ring its bell."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def position_text(queued: Queued) -> str:
    """The place, and the time until the start where there is a basis for one."""
    is_exact = queued.position_kind == "exact"
    if queued.position == 1:
        place = "next" if is_exact else "probably next"
    else:
        place = ordinal(queued.position) if is_exact else f"about {ordinal(queued.position)}"
    eta = "" if queued.eta_seconds is None else f", your turn in about {queued.eta_seconds:g} s"
    return f"You are {place} in line{_WAITS_FOR.get(queued.waits_for, eta)}"


_WAITS_FOR = {
    "conversation": ", behind an earlier message of this conversation",
    "client_limit": ", until one of your other requests ends",
    "opening": ", until the server is ready",
}


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …, 11th, …, 21st."""
    is_teen = number % 100 // 10 == 1
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
