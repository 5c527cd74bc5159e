"""`chatstream tune`: a table, a recommendation and its command; JSON, charts, and one line about what is wrong."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chatstream.cli.app import app, run
from tests.cli import command

MOCK = ("--engine", "mock", "--mock-type", "long", "--mock-time-per-token", "0.004")
SHORT = ("--max-concurrency", "2", "--prompt-tokens", "8", "--answer-tokens", "20")
QUICK = (*SHORT, "--seconds", "1")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_it_prints_a_table_the_reasons_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", *MOCK, *QUICK, "--itl-target-ms", "5000", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    assert out.startswith("mock-long: prompts of 8 tokens, answers of 20\n")
    for name in ("streams", "tokens/s", "curve", "each", "gap p50", "p90", "p99", "TTFT"):
        assert name in out
    assert "are allowed" in out
    assert "No curve: " in out
    *_, last = out.splitlines()
    expected = (
        "chatstream serve --engine mock --temperature 0.0 --mock-type long --mock-time-per-token 0.004 --max-conc"
    )
    assert last.startswith(expected)
    assert last.endswith("--itl-target-ms 5000")
    app.parse_args(shlex.split(last)[1:], exit_on_error=False, print_error=False)


def figures(path: Path, *arguments: str) -> dict[str, Any]:
    assert run(["tune", *arguments, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_all_figures_are_in_the_json(tmp_path: Path) -> None:
    found = figures(tmp_path / "found.json", *MOCK, *QUICK)
    assert [level["num_streams"] for level in found["levels"]] in ([1], [1, 2])
    for level in found["levels"]:
        assert level["tokens_per_s"] > 0
        assert 0 < level["itl_p50_s"] <= level["itl_p90_s"] <= level["itl_p99_s"]
    assert found["law"] is None
    assert found["recommendation"]["max_concurrency"] in (1, 2)
    assert found["settings"]["answer_tokens"] == 20
    assert found["command"].startswith("chatstream serve --engine mock")


@pytest.mark.parametrize("engine_in", ["process", "thread"])
def test_the_demo_model_end_to_end(engine_in: str, tmp_path: Path) -> None:
    found = figures(tmp_path / "found.json", *SHORT, "--seconds", "3", "--engine-in", engine_in)
    assert found["title"].startswith("chatstream-demo: ")
    assert found["levels"]
    assert ("--engine-in" in found["command"]) == (engine_in == "thread")


@pytest.mark.parametrize(("name", "begins"), [("found.svg", b"<?xml"), ("found.png", b"\x89PNG")])
def test_charts(name: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    assert run(["tune", *MOCK, *QUICK, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(begins)
    if name.endswith("svg"):
        drawn = path.read_text(encoding="utf-8")
        for words in (
            "mock-long: prompts of 8 tokens",
            "Throughput",
            "Gap between two tokens",
            "recommended",
            "target",
        ):
            assert words in drawn


def test_charts_without_matplotlib_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("chatstream.tuning.plot.find_spec", lambda name: None)
    assert run(["tune", "--plot", str(tmp_path / "found.svg")]) == 2
    assert capsys.readouterr().err == (
        "chatstream: --plot needs matplotlib: python -m pip install 'openchatstream[report]', or use --json\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "found.pdf"], ["--plot", ".png or .svg"]),
        (["--plot", "no/such/found.svg"], ["--plot", "no folder"]),
        (["--json", "no/such/found.json"], ["--json", "no folder"]),
        (["--itl-target-ms", "0"], ["--itl-target-ms", "> 0"]),
        (["--itl-target-ms", "inf"], ["--itl-target-ms", "at most"]),
        (["--seconds", "0"], ["--seconds", "> 0"]),
        (["--seconds", "1e9"], ["--seconds", "at most"]),
        (["--max-concurrency", "0"], ["--max-concurrency", "from 1"]),
        (["--max-concurrency", "auto"], ["--max-concurrency", "auto", "whole number"]),
        (["--prompt-tokens", "0"], ["--prompt-tokens", "from 1"]),
        (["--prompt-tokens", "90000"], ["--prompt-tokens", "context"]),
        (["--answer-tokens", "1.5"], ["--answer-tokens", "whole number"]),
        (["--max-new-tokens", "5"], ["--max-new-tokens", "--answer-tokens"]),
        (["--system-prompt", "x"], ["--system-prompt", "--prompt-tokens"]),
        (["--seconds", "0.05", "--engine", "mock"], ["--seconds", "too few"]),
        (["./no/such/model"], ["no such directory"]),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["tune", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("chatstream: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", *MOCK, *QUICK, "--json", str(tmp_path)]) == 2
    assert "--json cannot be written to" in capsys.readouterr().err


def test_ctrl_c_on_a_terminal_takes_the_progress_bar_away_and_ends() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command.COMMAND, "tune", *MOCK, "--seconds", "600"],
        env=command.environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    while b"1 stream" not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    while part := read(ours):
        shown += part
    assert process.wait(30) == 130
    assert b"Traceback" not in shown
    assert process.communicate()[0] == b""
    os.close(ours)


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody holds the other end any more
        return b""
