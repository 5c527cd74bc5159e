"""A short run of scripts/nightly, and its command line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.reliability.faults import FAULT_POINTS

NIGHTLY = [sys.executable, "-m", "tests.reliability.nightly"]


def test_a_short_run_leaks_nothing_and_reports_it() -> None:
    options = ["--seeds", "10", "--core", "3000", "--shell", "1000", "--sockets", "400", "--first-seed", "5000"]
    run = subprocess.run([*NIGHTLY, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for part, num_runs in (("worlds", 20), ("core", 1), ("shell", 1), ("sockets", 1)):
        (row,) = re.findall(rf"^{part} +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) ", run.stdout, re.MULTILINE)
        runs, requests, faults, *leaked = map(int, row)
        assert (runs, leaked) == (num_runs, [0, 0, 0])
        assert min(requests, faults) > 100 * (part != "worlds") + 20
    assert "nothing went wrong" in run.stdout
    num_kinds = int(re.findall(r"^(\d+) kinds of faults", run.stdout, re.MULTILINE)[0])
    assert num_kinds >= 20


def test_one_seed_can_be_repeated_with_fewer_requests_and_faults() -> None:
    options = ["--seed", "7", "--requests", "3", "--faults", "step raises,slow reader"]
    outputs = {subprocess.run([*NIGHTLY, *options], capture_output=True, text=True, check=True).stdout for _ in "12"}
    assert len(outputs) == 1
    assert "nothing went wrong" in outputs.pop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "5", "--faults", "step raises,nonsense"], ["there is no fault 'nonsense'", *FAULT_POINTS]),
        (["--seed", "5", "--requests", "0"], ["--requests must be at least 1"]),
        (["--faults", "step raises"], ["--faults", "need --seed"]),
    ],
    ids=["unknown fault", "no requests", "no seed"],
)
def test_a_meaningless_run_is_refused(options: list[str], words: list[str]) -> None:
    run = subprocess.run([*NIGHTLY, *options], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    message = run.stderr.partition("error: ")[2]
    assert [word for word in words if word not in message] == []
