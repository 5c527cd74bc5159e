"""What scripts/mutate found: a table of modules, the score, and the survivors. Run it where mutmut ran.

With --forget, before a run: whatever survived is tried again, because there may be a test for it now.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

FOUND = {"killed", "timeout", "suspicious", "segfault"}
"""A mutant that hangs or dies is noticed as well as one that fails a test."""
SURVIVED = (0, 33)
"""mutmut's exit codes for: every test passed, no test runs it."""


def mutmut(*arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def forget_survivors() -> None:
    for path in Path("mutants").rglob("*.meta"):
        meta = json.loads(path.read_text())
        codes = meta["exit_code_by_key"]
        meta["exit_code_by_key"] = {name: None if code in SURVIVED else code for name, code in codes.items()}
        path.write_text(json.dumps(meta))


def main() -> None:
    if "--forget" in sys.argv:
        forget_survivors()
        return
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for line in mutmut("results", "--all", "true").splitlines():
        name, _, status = line.strip().rpartition(": ")
        if not name or status == "not checked":
            continue
        module = name.partition(".x")[0].removeprefix("chatstream.scheduler").lstrip(".") or "__init__"
        by_module[module]["found" if status in FOUND else "missed"] += 1
        if status not in FOUND:
            survivors.append((name, status))
    for module, counts in sorted(by_module.items()):
        print(f"{module:20} {counts['found']:5} of {counts.total():5}  {counts['found'] / counts.total():7.1%}")
    total = sum(by_module.values(), Counter())
    if total:
        print(f"{'all':20} {total['found']:5} of {total.total():5}  {total['found'] / total.total():7.1%}")
    for name, status in survivors:
        print(mutmut("show", name) if "--show" in sys.argv else f"{status}: {name}")


if __name__ == "__main__":
    main()
