"""How much memory the machine still has, for engines that compute on it."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has left, or the container (cgroup v2) where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split(maxsplit=1) for line in (cgroup / "memory.stat").read_text().splitlines())
        # Pages of files that were read, such as a checkpoint, are given back when memory is wanted (kubelet counts so).
        used -= int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return available  # no container, or one without a limit ("max")
    return max(0, min(available, limit - used))
