"""The asyncio shell around the scheduler: the only room with tasks, futures and timers.

    worker.py     runs generations, carries out the scheduler's decisions, reports facts to it, keeps its one timer
    positions.py  sends waiting requests their position and ETA
    stream.py     the events of one request, as a bounded stream with one reader
    resumable.py  streams that outlive their connection, so that a client can resume
    settings.py   buffers, intervals and timeouts of streams

Depends on the scheduler; takes a generation as an async generator of `TokenDelta`. Contains no HTTP, model or session.
"""

from chatstream.runtime.settings import RuntimeSettings
from chatstream.runtime.stream import RequestStream
from chatstream.runtime.worker import End, QueueWorker

__all__ = ["End", "QueueWorker", "RequestStream", "RuntimeSettings"]
