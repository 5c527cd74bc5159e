"""ChatStream: a queue and an exact limit in front of text generation.

    chat_stream = ChatStream("Qwen/Qwen3-0.6B", max_concurrency=4, max_queue_size=50)
    app = FastAPI(lifespan=chat_stream.lifespan)
    app.include_router(chat_stream.router)

Importing this package loads neither torch nor a web framework; each name is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chatstream import moved

if TYPE_CHECKING:
    from chatstream.access import AccessSettings
    from chatstream.chat_stream import ChatRequest, ChatStream
    from chatstream.engines.loading.settings import LoadSettings
    from chatstream.engines.mock import MockEngine
    from chatstream.errors import ChatStreamError
    from chatstream.runtime import RuntimeSettings
    from chatstream.scheduler import SchedulerSettings
    from chatstream.sessions import SessionSettings
    from chatstream.types import Done, FinishReason, Message, Queued, SamplingParams, Started, Token, Usage

_MODULE_OF = {
    "AccessSettings": "access",
    "ChatRequest": "chat_stream",
    "ChatStream": "chat_stream",
    "ChatStreamError": "errors",
    "Done": "types",
    "FinishReason": "types",
    "LoadSettings": "engines.loading.settings",
    "Message": "types",
    "MockEngine": "engines.mock",
    "Queued": "types",
    "RuntimeSettings": "runtime",
    "SamplingParams": "types",
    "SchedulerSettings": "scheduler",
    "SessionSettings": "sessions",
    "Started": "types",
    "Token": "types",
    "Usage": "types",
}

__all__ = [
    "AccessSettings",
    "ChatRequest",
    "ChatStream",
    "ChatStreamError",
    "Done",
    "FinishReason",
    "LoadSettings",
    "Message",
    "MockEngine",
    "Queued",
    "RuntimeSettings",
    "SamplingParams",
    "SchedulerSettings",
    "SessionSettings",
    "Started",
    "Token",
    "Usage",
]

moved.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"chatstream.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
