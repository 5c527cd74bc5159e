"""How much memory the machine still has, for engines that compute on it, and how an amount is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_host_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the machine has left; less where a container or a service (cgroup v2) may not have all of that.

    `root`: where the groups are mounted. `own`: the file that names this process's group.
    """
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(_left_in(group) for group in _groups(root, own))]))


def in_words(num_bytes: int) -> str:
    """In GiB; below one in MiB, so that also what a small model takes is more than 0."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """This process's group and those around it that can be seen: each one's limit counts."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    groups = (root / name, *(root / name).parents)
    yield from groups[: groups.index(root) + 1]


def _left_in(group: Path) -> int:
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that were read, such as a checkpoint, are given back when memory is wanted (kubelet counts so).
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return sys.maxsize  # no such group here, or one without a limit ("max")
