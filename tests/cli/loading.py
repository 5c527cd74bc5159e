"""A server whose engine thread reads the outcome of loading from stdin: `go`, `config` or `bug`."""

from __future__ import annotations

import os
import sys

from chatstream.chat_stream import ChatStream
from chatstream.engines import demo
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel
from chatstream.errors import ChatStreamError, ConfigError
from chatstream.server import serve


def load() -> LoadedModel:
    word = os.read(0, 100).decode().strip()
    if word == "config":
        raise ConfigError("no such checkpoint")
    if word == "bug":
        raise ZeroDivisionError("division by zero")
    return demo.load()


try:
    serve(
        ChatStream(engine=StepEngine("late", load), max_concurrency=1),
        port=0,
        on_listening=lambda url: print(url, flush=True),
        on_ready=lambda url: print("ready", flush=True),
    )
except ChatStreamError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(3)
