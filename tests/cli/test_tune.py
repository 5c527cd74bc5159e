"""`chatstream tune`: table, recommendation, command line, JSON, charts, and one-line errors."""

from __future__ import annotations

import json
import logging
import os
import pty
import shlex
import signal
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from chatstream.cli.app import app, run
from chatstream.engines.base import Engine
from chatstream.engines.mock import MockEngine
from chatstream.errors import EngineError
from chatstream.tuning import Sweep, SweepSettings, recommend
from chatstream.types import GenerationRequest, TokenDelta
from tests.cli import command
from tests.tuning.levels import levels

logger = logging.getLogger("chatstream")

MOCK = ("--engine", "mock", "--mock-type", "long", "--mock-time-per-token", "0.004")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def _measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the sweep by steps of 20 ms plus 4 ms per stream. tests/tuning/test_sweep.py tests the sweep."""

    async def sweep(engine: Engine, settings: SweepSettings, **_: object) -> Sweep:
        assert engine.health().is_ready
        measured = levels(lambda n: 0.02 + 0.004 * n, (1, 2, 4, 8, 16))
        found = recommend(measured, itl_target_s=settings.itl_target_s, why_no_more="enough")
        return Sweep(levels=tuple(measured), why_ended="enough", recommendation=found, engine_failed=False)

    monkeypatch.setattr("chatstream.tuning.sweep", sweep)


def test_the_demo_model_end_to_end(tmp_path: Path) -> None:
    """In a child process, for at most three real seconds."""
    found = figures(
        tmp_path / "found.json",
        *("--max-streams", "2", "--prompt-tokens", "8", "--answer-tokens", "20", "--seconds", "3"),
    )
    assert found["title"] == "chatstream-demo: prompts of 8 tokens, answers of 20"
    assert [level["num_streams"] for level in found["levels"]] in ([1], [1, 2])
    for level in found["levels"]:
        assert level["tokens_per_s"] > 0
        assert 0 < level["itl_p50_s"] <= level["itl_p90_s"] <= level["itl_p99_s"]
    assert found["law"] is None
    assert found["recommendation"]["max_concurrency"] in (1, 2)
    assert found["settings"]["answer_tokens"] == 20


def figures(path: Path, *arguments: str) -> dict[str, Any]:
    assert run(["tune", *arguments, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.usefixtures("_measured_at_once")
def test_it_prints_a_table_the_reasons_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", *MOCK, "--itl-target-ms", "55.5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    assert out.startswith("mock-long: prompts of 64 tokens, answers of 128\n")
    for name in ("streams", "tokens/s", "curve", "each", "gap p50", "p90", "p99", "TTFT"):
        assert name in out
    assert "8: 99 of 100 gaps between tokens within 52 ms, where 55.5 ms are allowed; 154 tokens/s" in out
    assert "Universal scalability law: 24 ms a step" in out
    *_, last = out.splitlines()
    assert last == (
        "chatstream serve --engine mock --temperature 0.0 --mock-type long --mock-time-per-token 0.004 "
        "--max-concurrency 8 --itl-target-ms 55.5"
    )
    app.parse_args(shlex.split(last)[1:], exit_on_error=False, print_error=False)


@pytest.mark.usefixtures("_measured_at_once")
def test_all_figures_are_in_the_json(tmp_path: Path) -> None:
    found = figures(tmp_path / "found.json", *MOCK)
    assert [level["num_streams"] for level in found["levels"]] == [1, 2, 4, 8, 16]
    assert found["levels"][0]["itl_p99_s"] == pytest.approx(0.024)
    assert found["law"]["contention"] == pytest.approx(1 / 6)
    assert (found["why_ended"], found["engine_failed"]) == ("enough", False)
    assert found["recommendation"]["max_concurrency"] == 16
    assert found["settings"]["itl_target_s"] == 0.1
    assert found["command"].startswith("chatstream serve --engine mock")


@pytest.mark.usefixtures("_measured_at_once")
@pytest.mark.parametrize(("options", "itl_target_s"), [([], None), (["--itl-target-ms", "20"], 0.02)])
def test_the_engine_is_made_as_the_recommended_server_makes_it(
    options: list[str], itl_target_s: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The size of prompt parts depends on the target, so the measured engine must have the same one."""
    made: list[dict[str, Any]] = []

    def engine_for(*_: object, **settings: Any) -> Engine:
        made.append(settings)
        return MockEngine()

    monkeypatch.setattr("chatstream.config.engine_for", engine_for)
    monkeypatch.setattr("chatstream.server.serve", lambda *_, **__: None)
    found = figures(tmp_path / "found.json", *options, "--engine-in", "thread")
    assert run(shlex.split(found["command"])[1:]) == 0
    tuned, served = made
    assert tuned == served
    assert (tuned["itl_target_s"], tuned["engine_in"]) == (itl_target_s, "thread")


@pytest.mark.usefixtures("_measured_at_once")
def test_limits_of_a_server_in_the_environment_are_not_those_of_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHATSTREAM_MAX_CONCURRENCY", "auto")
    assert figures(tmp_path / "found.json", *MOCK)["settings"]["max_streams"] == 64
    monkeypatch.setenv("CHATSTREAM_MAX_CONCURRENCY", "8")
    assert figures(tmp_path / "found.json", *MOCK)["settings"]["max_streams"] == 64


def test_an_environment_variable_without_effect_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATSTREAM_MAX_NEW_TOKENS", "256")
    assert run(["tune"]) == 2
    assert "CHATSTREAM_MAX_NEW_TOKENS" in capsys.readouterr().err


class LoggingEngine(MockEngine):
    """An engine that logs a warning while it loads, and whose requests fail."""

    async def start(self) -> None:
        logger.warning("it is slow, because")
        await super().start()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        logger.error("a step failed", exc_info=ZeroDivisionError())
        raise EngineError("the step failed")
        yield


def test_warnings_while_loading_are_printed_and_an_error_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a process without a logging configuration.
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr("chatstream.engines.mock.MockEngine", LoggingEngine)
    assert run(["tune", *MOCK]) == 1
    assert capsys.readouterr().err == "it is slow, because\nchatstream: the step failed\n"


@pytest.mark.usefixtures("_measured_at_once")
@pytest.mark.parametrize(("name", "begins"), [("found.svg", b"<?xml"), ("found.png", b"\x89PNG")])
def test_charts(name: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    assert run(["tune", *MOCK, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(begins)
    if name.endswith("svg"):
        drawn = path.read_text(encoding="utf-8")
        for words in (
            "mock-long: prompts of 64 tokens",
            "Throughput",
            "Gap between two tokens",
            "scalability law",
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
        "chatstream: --plot needs matplotlib: pip install 'openchatstream[report]', "
        "in a clone pip install -e '.[report]'; or use --json\n"
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
        (["--max-streams", "0"], ["--max-streams", "between 1 and 4,096"]),
        (["--max-streams", "auto"], ["--max-streams", "auto", "whole number"]),
        (["--prompt-tokens", "0"], ["--prompt-tokens", "between 1 and 100,000"]),
        (["--prompt-tokens", "90000"], ["--prompt-tokens", "context"]),
        (["--answer-tokens", "1.5"], ["--answer-tokens", "whole number"]),
        (["--max-new-tokens", "5"], ["--max-new-tokens", "--answer-tokens"]),
        (["--system-prompt", "x"], ["--system-prompt", "--prompt-tokens"]),
        (["--seconds", "0.05", "--engine", "mock"], ["--seconds", "too few"]),
        (["./no/such/model"], ["no such directory"]),
    ],
)
def test_a_wrong_option_is_reported_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["tune", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("chatstream: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.usefixtures("_measured_at_once")
def test_a_file_that_cannot_be_written_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", *MOCK, "--json", str(tmp_path)]) == 2
    assert "--json cannot be written to" in capsys.readouterr().err


def test_ctrl_c_on_a_terminal_removes_the_progress_bar_and_exits() -> None:
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
    except OSError:  # the other end is closed
        return b""
