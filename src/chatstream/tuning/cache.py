"""Keeps measured limits on disk: one small JSON file for each machine, model and target.

An old, damaged or unrelated file counts as missing, and a disk that cannot be written is not an error. All methods
block on disk I/O.
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
"""Everything that a measured limit depends on."""

MAX_AGE_S = 30 * 24 * 3600.0
"""Measurements expire: a machine may change without a change of the key, and one measurement may be disturbed."""
MAX_FILES = 100
"""Beyond this number, the oldest files are deleted."""


class LimitCache:
    """Measured concurrency limits in a folder, by default in the user's cache folder (`XDG_CACHE_HOME`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or user_cache_path("chatstream") / "max-concurrency"

    def read(self, key: Key) -> int | None:
        """Return the stored limit, or None if there is no valid one."""
        file = self._file(key)
        try:
            if abs(time.time() - file.stat().st_mtime) > MAX_AGE_S:
                return None
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        match stored:
            case {"key": dict(stored_key), "max_concurrency": int(limit)} if stored_key == dict(key) and limit >= 1:
                return int(limit)
        return None

    def write(self, key: Key, max_concurrency: int) -> None:
        """Store a limit atomically, also with several writing processes. A failure is logged, not raised."""
        file = self._file(key)
        text = json.dumps({"key": dict(key), "max_concurrency": max_concurrency}, indent=2) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder.parent) as temporary:
                (Path(temporary) / file.name).write_text(text, encoding="utf-8")
                os.replace(Path(temporary) / file.name, file)
            self._delete_oldest()
        except OSError as error:
            logger.info("the measured limit could not be cached: %s", error)

    def _file(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"

    def _delete_oldest(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MAX_FILES:]:
            file.unlink(missing_ok=True)


def this_machine() -> dict[str, str | int]:
    """Return the readable properties that determine the speed: processor, cores, threads, system and Python."""
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
