"""How far a model's loading is, for a log and for whoever asks: the bars of the libraries, without drawing them."""

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
"""Between two lines in the log. What is done sooner has none."""

OnProgress = Callable[[str, float], None]
"""Told what is being done ("reading weights") and the share of it that is done, 0 to 1, in the thread that loads."""

_hooked = threading.Lock()
"""The libraries have one hook for the whole process, so one model is read at a time."""


class Progress:
    """Passes shares on, to the caller when a percent has come about, to the log every few seconds."""

    def __init__(self, name: str, on_progress: OnProgress | None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._on_progress = on_progress
        self._now_s = now_s
        self._told: tuple[str, int] | None = None
        self._logged_s = now_s()

    def tell(self, what: str, share: float) -> None:
        percent = int(100 * share)
        if (what, percent) == self._told:
            return
        self._told = (what, percent)
        if self._on_progress is not None:
            self._on_progress(what, share)
        if self._now_s() - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = self._now_s()
            logger.info("%s: %s, %d %%", self._name, what, percent)

    def bytes_of(self, what: str, total: int) -> Callable[[int], None]:
        """A function to call with the bytes that have been done more."""
        done = 0

        def add(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.tell(what, min(1.0, done / max(1, total)))

        return add

    @contextmanager
    def of_libraries(self) -> Iterator[type[tqdm]]:
        """Inside, transformers tells its progress here, and does not log its own tables of weights.

        Yields the class of bars to give to downloads.
        """
        reading, downloading = _bar_class(self, "reading weights"), _bar_class(self, "downloading weights")
        with _hooked:
            verbosity = transformers_logging.get_verbosity()
            hook = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: reading(*args, **kwargs))
            transformers_logging.set_verbosity_error()
            try:
                yield downloading
            finally:
                transformers_logging.set_tqdm_hook(hook)
                transformers_logging.set_verbosity(verbosity)


def _bar_class(progress: Progress, what: str) -> type[tqdm]:
    class Bar(tqdm):  # type: ignore[misc]  # it comes without types
        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own word for a group of bars
            super().__init__(*args, **(kwargs | {"disable": False, "file": io.StringIO(), "mininterval": 0.2}))

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.total:
                progress.tell(what, min(1.0, self.n / self.total))

    return Bar
