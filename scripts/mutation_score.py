"""Prints the results of scripts/mutate: a table of modules, the score, and the survivors. Run it where mutmut ran.

With --forget, before a run: marks survivors as untested, because a new test may detect them, and deletes the results of
removed files. With --draw N: prints the names of N random mutants. If sample.txt lists them, only they are scored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from pathlib import Path
from random import Random

DETECTED = {"killed", "timeout", "suspicious", "segfault"}
"""A mutant that hangs or crashes counts as detected, like one that fails a test."""
SURVIVED = (0, 33)
"""mutmut's exit codes for "every test passed" and "no test runs it"."""
SCHEDULER = Path("src/chatstream/scheduler")
SAMPLE = Path("sample.txt")


def mutmut(*arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def results() -> dict[str, str]:
    """The status of every mutant, run or not, by name."""
    lines = mutmut("results", "--all", "true").splitlines()
    return {name: status for name, _, status in (line.strip().rpartition(": ") for line in lines) if name}


def forget() -> None:
    """Reset the results of survivors; delete the results of removed files."""
    for path in list(Path("mutants").rglob("*.meta")):
        mutated = path.with_suffix("")
        if not mutated.relative_to("mutants").exists():
            for stale in mutated.parent.glob(f"{mutated.name}*"):
                stale.unlink()
            continue
        meta = json.loads(path.read_text())
        codes = meta["exit_code_by_key"]
        meta["exit_code_by_key"] = {name: None if code in SURVIVED else code for name, code in codes.items()}
        path.write_text(json.dumps(meta))


def draw(names: Iterable[str], count: int, seed: int) -> list[str]:
    """A random sample; the same for the same names, in any order."""
    ordered = sorted(names)
    if not 0 < count <= len(ordered):
        raise SystemExit(f"a sample of {count} cannot be drawn: there are {len(ordered):,} mutants")
    return Random(seed).sample(ordered, count)


def without_mutants(sources: Iterable[Path]) -> list[Path]:
    """Source files without mutants, which the score would not cover."""
    return [path for path in sources if not Path("mutants", f"{path}.meta").exists()]


def interval(found: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share observed in a random sample (Wilson 1927)."""
    z, part = 1.96, found / total
    middle, half = part + z * z / (2 * total), z * sqrt(part * (1 - part) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def module(name: str) -> str:
    """The scheduler module of a mutant."""
    return name.partition(".x")[0].removeprefix("chatstream.scheduler").lstrip(".") or "__init__"


def table(tried: dict[str, str], *, is_sample: bool) -> list[str]:
    """The result table as lines: one for each module, then the total."""
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in tried.items():
        by_module[module(name)]["found" if status in DETECTED else "missed"] += 1
    total = sum(by_module.values(), Counter())
    lines = [
        f"{name:20} {counts['found']:5} of {counts.total():5}  {counts['found'] / counts.total():7.1%}"
        for name, counts in [*sorted(by_module.items()), ("all", total)]
        if counts
    ]
    if is_sample and total:
        low, high = interval(total["found"], total.total())
        lines.append(f"a random sample; 95 % interval of the score of all: {low:.1%} to {high:.1%}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", action="store_true")
    parser.add_argument("--draw", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=2026, help="seed of --draw; default %(default)s")
    parser.add_argument("--show", action="store_true", help="print survivors as diffs")
    options = parser.parse_args(arguments)
    if options.forget:
        forget()
        return
    if missing := without_mutants(sorted(SCHEDULER.rglob("*.py"))):
        raise SystemExit(f"not changed by mutmut: {', '.join(map(str, missing))}")
    if options.draw is not None:
        print(*draw(results(), options.draw, options.seed), sep="\n")
        return
    sample = SAMPLE.read_text(encoding="utf-8").split() if SAMPLE.exists() else None
    tried = {name: status for name, status in results().items() if status != "not checked"}
    if sample is not None:
        tried = {name: tried[name] for name in sample if name in tried}
    print(*table(tried, is_sample=sample is not None), sep="\n")
    for name, status in tried.items():
        if status not in DETECTED:
            print(mutmut("show", name) if options.show else f"{status}: {name}")


if __name__ == "__main__":
    main()
