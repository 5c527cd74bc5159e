"""Progress of a model's load, for the log and a callback: the libraries' progress bars, reported instead of drawn."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
"""Interval of the log lines. A stage that takes less has no line."""

OnProgress = Callable[[str, float], None]
"""Called with the stage ("reading weights") and its completed share, 0 to 1, in the thread that loads."""

_hook_lock = threading.Lock()
"""The libraries have one hook for the whole process, so one model is read at a time."""


class Progress:
    """Reports progress: each new percent to the callback, and every few seconds to the log."""

    def __init__(self, name: str, on_progress: OnProgress | None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._on_progress = on_progress
        self._now_s = now_s
        self._reported: tuple[str, int] | None = None
        self._logged_s = now_s()

    def report(self, stage: str, share: float) -> None:
        """`share`: the completed share of the stage, 0 to 1."""
        percent = int(100 * share)
        if (stage, percent) == self._reported:
            return
        self._reported = (stage, percent)
        if self._on_progress is not None:
            self._on_progress(stage, share)
        if self._now_s() - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = self._now_s()
            logger.info("%s: %s, %d %%", self._name, stage, percent)

    def byte_counter(self, stage: str, total: int) -> Callable[[int], None]:
        """Return a function to call with each further number of processed bytes, of `total` in all."""
        done = 0

        def add(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.report(stage, min(1.0, done / max(1, total)))

        return add

    @contextmanager
    def capture_bars(self) -> Iterator[type[tqdm]]:
        """Report the progress bars of transformers in this context, and silence its log below errors.

        Yields the class of progress bars to pass to downloads.
        """
        reading, downloading = _bar_class(self, "reading weights"), _bar_class(self, "downloading weights")
        with _hook_lock:
            verbosity = transformers_logging.get_verbosity()
            hook = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: reading(*args, **kwargs))
            transformers_logging.set_verbosity_error()
            try:
                yield downloading
            finally:
                transformers_logging.set_tqdm_hook(hook)
                transformers_logging.set_verbosity(verbosity)


def _bar_class(progress: Progress, stage: str) -> type[tqdm]:
    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no monitor thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's argument for a group of bars; tqdm refuses it
            super().__init__(*args, **(kwargs | {"disable": False, "file": io.StringIO(), "mininterval": 0.2}))

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.total:
                progress.report(stage, min(1.0, self.n / self.total))

    return Bar
