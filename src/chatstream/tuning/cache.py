"""What was measured once is kept on disk: one small JSON file for each machine, model and target.

A file that is old, damaged, of another form, or not about what is asked for is as if it were not there; so is a disk
that cannot be written. Everything here waits for a disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from platformdirs import user_cache_path

logger = logging.getLogger(__name__)

Key: TypeAlias = Mapping[str, str | int | float | None]
"""Everything that the answer depends on."""

MAX_AGE_S = 30 * 24 * 3600.0
"""Machines change in ways that no key shows, and one measurement may have been disturbed."""
MAX_FILES = 100
"""The oldest go."""


class LimitCache:
    """Found concurrency limits in a folder, by default in the user's cache folder (`XDG_CACHE_HOME`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or user_cache_path("chatstream") / "max-concurrency"

    def read(self, key: Key) -> int | None:
        """None: nothing is known."""
        file = self._file(key)
        try:
            if abs(time.time() - file.stat().st_mtime) > MAX_AGE_S:
                return None
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        match kept:
            case {"key": dict(kept_key), "max_concurrency": int(limit)} if kept_key == dict(key) and limit >= 1:
                return int(limit)
        return None

    def write(self, key: Key, max_concurrency: int) -> None:
        """Whole or not at all, also when several processes write."""
        file = self._file(key)
        text = json.dumps({"key": dict(key), "max_concurrency": max_concurrency}, indent=2) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder.parent) as unfinished:
                (Path(unfinished) / file.name).write_text(text, encoding="utf-8")
                os.replace(Path(unfinished) / file.name, file)
            self._forget_the_oldest()
        except OSError as error:
            logger.info("what was measured is not kept: %s", error)

    def _file(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def _forget_the_oldest(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MAX_FILES:]:
            file.unlink(missing_ok=True)


def this_machine() -> dict[str, str | int]:
    """What its speed depends on, as far as it can be read: the processor, and how many cores and threads are used."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": _cpu_name(),
        "cores": num_cores,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor()
