"""Free memory of the machine, for engines that compute on it, and the text form of an amount of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil


def free_host_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Free memory of the machine, or of the container or service (cgroup v2) if its limit allows less.

    `root`: the mount point of the cgroups. `own`: the file that names the cgroup of this process.
    """
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(_left_in(group) for group in _groups(root, own))]))


def in_words(num_bytes: int) -> str:
    """The amount in GiB, or in MiB below 1 GiB, so that the size of a small model is not shown as 0."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The cgroup of this process and its visible ancestors. The limit of each applies."""
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
        # Cached pages of files, such as a checkpoint, are reclaimable (the kubelet counts them the same way).
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return sys.maxsize  # no such cgroup, or a cgroup without a limit ("max")
