"""The benchmarks still run. What they measure is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCHEDULER = Path(__file__).parent.parent / "benchmarks" / "scheduler.py"


def run(tmp_path: Path, *options: str) -> Any:
    """What the benchmark writes about a small crowd."""
    report = tmp_path / "figures.json"
    command = [sys.executable, str(SCHEDULER), "--json", str(report), "--waiting", "50", "--seconds", "0.2", *options]
    done = subprocess.run([*command, "--rounds", "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_crowd_waits_over_real_sockets_and_goes(tmp_path: Path) -> None:
    (round_,) = run(tmp_path, "--only", "M4", "--only", "M6")["sockets"]
    assert round_["waiting"]["num_waiting"] == 50
    assert round_["waiting"]["errors"] == {}
    assert round_["waiting"]["gaps_crowded"]["count"] > 0


def test_a_line_is_told_its_places_at_every_rate(tmp_path: Path) -> None:
    *rates, broadcast = run(tmp_path, "--only", "M8")["telling"]
    assert len(rates) == 4
    assert broadcast["messages_per_change"] == 50
