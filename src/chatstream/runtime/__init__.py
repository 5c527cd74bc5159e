"""The asyncio shell around the scheduler: the only room with tasks, futures and timers.

    worker.py     acts on the scheduler's decisions, tells it what happened, keeps its one timer
    positions.py     tells those who wait where they stand and when they will start
    stream.py     what happens to one request, as a bounded stream of events with one reader
    resumable.py  streams that outlive their connection, for readers who come back
    settings.py   how streams are told, kept and cut

Knows the scheduler and that a generation is an async generator of `TokenDelta`. Knows no HTTP, no model, no session.
"""

from chatstream.runtime.settings import RuntimeSettings
from chatstream.runtime.stream import RequestStream
from chatstream.runtime.worker import End, QueueWorker

__all__ = ["End", "QueueWorker", "RequestStream", "RuntimeSettings"]
