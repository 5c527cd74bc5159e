"""`chatstream simulate`: table, JSON, report, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatstream.cli.app import run
from tests.cli import command

QUICK = ("--requests", "200", "--max-concurrency", "2")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["simulate", *QUICK, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def only_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    [variant] = figures(capsys, *arguments)["variants"]
    [one] = variant["runs"]
    return dict(one)


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "conv, 200 calls" in out
    assert "good is a first token within 30 s" in out
    for row in ("good service, of all calls", "refused", "first token, 99 of 100 within", "Jain"):
        assert row in out
    assert "estimates" not in out


def test_more_slots_is_a_second_column_for_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    two, four = figures(capsys, "--load", "2", "--more-slots", "2")["variants"]
    assert (two["max_concurrency"], four["max_concurrency"]) == (2, 4)
    assert two["runs"][0]["offered"] == four["runs"][0]["offered"]
    assert two["runs"][0]["load"] == pytest.approx(2 * four["runs"][0]["load"])
    assert two["runs"][0]["attainment"] < 0.7 < four["runs"][0]["attainment"]


def test_several_seeds_are_medians_and_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    runs = figures(capsys, "--seed", "3", "--seed", "4")["variants"][0]["runs"]
    assert [one["seed"] for one in runs] == [3, 4]
    assert runs[0]["attainment"] != runs[1]["attainment"]
    assert run(["simulate", *QUICK, "--seed", "3", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "medians of 2 seeds" in out
    assert "over the seeds" in out


def test_the_same_command_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        assert run(["simulate", *QUICK, "--eta"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "estimates: median error" in printed[0]


def test_options_reach_the_scheduler_and_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    plain = only_run(capsys, "--load", "2")
    assert only_run(capsys, "--load", "2", "--max-queue-size", "0")["refused"] > plain["refused"]
    assert only_run(capsys, "--load", "2", "--max-queue-size", "50", "--max-wait", "5")["expired"] > 0
    assert only_run(capsys, "--load", "2", "--max-queue-size", "auto", "--ttft-slo", "8")["ttft_p90_s"] < 8.5
    assert only_run(capsys, "--load", "2", "--policy", "fair") != plain
    assert only_run(capsys, "--load", "2", "--max-waiting-per-client", "0")["refused"] > plain["refused"]
    assert only_run(capsys, "--load", "2", "--max-running-per-client", "1") != plain
    assert only_run(capsys, "--load", "2", "--attempts", "3")["attempts"] > plain["attempts"]
    assert only_run(capsys, "--load", "2", "--max-queue-size", "50", "--patience", "5")["abandoned"] > 0
    assert only_run(capsys, "--rate", "1", "--time-per-token", "0.2")["load"] > 10
    assert only_run(capsys, "--rate", "0.2", "--prefill-tokens-per-s", "10")["ttft_p50_s"] > 60
    assert only_run(capsys, "--rate", "0.5", "--slowdown-per-slot", "1")["load"] > 2


def test_users_and_calls_per_user_set_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    one = only_run(capsys, "--users", "20", "--calls-per-user", "36", "--duration", "500")
    assert one["offered"] / one["duration_s"] == pytest.approx(20 * 36 / 3600, rel=0.3)
    assert 10 < len(one["clients"]) <= 20


def test_good_ttft_sets_the_criterion_of_good_service(capsys: pytest.CaptureFixture[str]) -> None:
    strict, lenient = (only_run(capsys, "--good-ttft", seconds) for seconds in ("2", "60"))
    assert strict["attainment"] < lenient["attainment"]
    assert strict["ttft_p50_s"] == lenient["ttft_p50_s"]


def test_a_trace_file_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{n},100,50,user {n % 3}" for n in range(100)]
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,client\n" + "\n".join(lines))
    one = only_run(capsys, "--trace", str(path))
    assert {client["client"] for client in one["clients"]} == {"user 0", "user 1", "user 2"}
    assert one["load"] == pytest.approx(0.55, rel=0.02)  # 1.1 s of work a second, on 2 slots
    assert only_run(capsys, "--trace", str(path), "--load", "1.5")["load"] == pytest.approx(1.5, rel=0.05)
    assert run(["simulate", "--trace", str(path), "--requests", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"][0]["runs"][0]["offered"] == 45  # without the first tenth


HEAD = "arrival_s,prompt_tokens,output_tokens\n"


def test_a_trace_with_unix_times_equals_one_that_starts_at_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.csv"
    found = []
    for began_s in (0, 1_760_000_000):
        path.write_text(HEAD + "".join(f"{began_s + 10 * n},200,100\n" for n in range(100)))
        found.append([only_run(capsys, "--trace", str(path), *more) for more in ([], ["--load", "0.5"])])
    assert found[0] == found[1]
    as_recorded, stretched = found[0]
    assert as_recorded["load"] == pytest.approx(0.11, rel=0.02)  # 2.2 s of work in 10 s, on 2 slots
    assert stretched["load"] == pytest.approx(0.5, rel=0.02)
    assert stretched["refused"] == 0


@pytest.mark.parametrize("cell", ["1760000000000,1,1", "1760000000000000000,1,1", "1e300,1,1", f"0,{10**23},1"])
def test_an_implausible_number_in_a_trace_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEAD + cell + "\n")
    assert run(["simulate", "--trace", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "mine.csv, line 2, column " in err


def test_calls_at_one_moment_have_no_load_and_cannot_be_stretched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEAD + "5,2,10\n" * 3)
    assert run(["simulate", "--trace", str(path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ load ")]
    assert row.split("│")[2].strip() == "–"
    assert only_run(capsys, "--trace", str(path))["load"] is None
    for option in ("--load", "--rate"):
        assert run(["simulate", "--trace", str(path), option, "2"]) == 2
        err = capsys.readouterr().err
        assert f"{option}: the calls of {path} all arrive at one moment" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("which", [["--requests", "1"], ["--trace", "mine.csv"]])
def test_calls_at_one_moment_can_be_reported(
    which: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text(HEAD + "5,2,10\n" * 30)
    assert run(["simulate", *which, "--report", "r.html"]) == 0
    assert "<svg" in Path("r.html").read_text(encoding="utf-8")


def test_a_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", *QUICK, "--more-slots", "1", "--report", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<th>3 slots</th>" in page
    assert run(["simulate", *QUICK, "--json", "--report", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    assert (tmp_path / "r" / "figures.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "chat"], ["--workload", "conv", "chat"]),
        (["--trace", "nowhere.csv"], ["nowhere.csv", "No such file"]),
        (["--load", "0"], ["--load", "above 0"]),
        (["--load", "1", "--rate", "1"], ["--load", "--rate", "leave out one"]),
        (["--rate", "1", "--calls-per-user", "1"], ["--rate", "--calls-per-user"]),
        (["--rate", "1e9"], ["requests", "at most"]),
        (["--rate", "1e-12", "--requests", "3"], ["a year", "at most"]),
        (["--rate", "1e-300", "--requests", "3"], ["a year", "at most"]),
        (["--duration=-1"], ["--duration", "above 0"]),
        (["--requests", "0"], ["--requests", "at least 1"]),
        (["--requests", "1.5"], ["--requests", "1.5", "whole number"]),
        (["--seed", "one"], ["--seed", "one", "whole number"]),
        (["--users", "0"], ["--users", "at least 1"]),
        (["--attempts", "0"], ["--attempts", "at least 1"]),
        (["--patience", "0"], ["--patience", "seconds above 0"]),
        (["--max-concurrency", "0"], ["--max-concurrency", "between 1 and 1,000,000"]),
        (["--max-concurrency", "auto"], ["--max-concurrency", "auto", "not a whole number"]),
        (["--max-queue-size", "lots"], ["--max-queue-size", "lots", "auto"]),
        (["--policy", "lifo"], ["--policy", "lifo", "fcfs"]),
        (["--max-wait", "0"], ["--max-wait", "seconds above 0"]),
        (["--ttft-slo", "0"], ["--ttft-slo", "seconds above 0"]),
        (["--slice-tokens", "0"], ["--slice-tokens", "between 1 and 1,000,000"]),
        (["--prefill-tokens-per-s", "0"], ["--prefill-tokens-per-s", "between 1e-09 and 1e+09"]),
        (["--time-per-token", "0"], ["--time-per-token", "between 1e-09 and 1e+09"]),
        (["--time-per-token", "1e300"], ["--time-per-token", "1e+09"]),
        (["--slowdown-per-slot=-1"], ["--slowdown-per-slot", "between 0 and 1e+09"]),
        (["--prefill-chunk-tokens", "0"], ["--prefill-chunk-tokens", "at least 1"]),
        (["--more-slots", "0"], ["--more-slots", "at least 1"]),
        (["--good-ttft", "0"], ["--good-ttft", "above 0"]),
        (["--report", "/nowhere/x.svg"], ["--report", "/nowhere"]),
    ],
    ids=" ".join,
)
def test_an_error_is_reported_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("chatstream: ")
    for word in words:
        assert word in err


def test_options_without_effect_on_a_trace_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    for option, value in {"--users": "5", "--calls-per-user": "5", "--duration": "3600", "--workload": "conv"}.items():
        assert run(["simulate", "--trace", str(path), option, value]) == 2
        err = capsys.readouterr().err
        assert f"{option} has no effect with --trace" in err
        assert err.count("\n") == 1


def test_the_command_reads_options_from_the_environment() -> None:
    env = command.environment(CHATSTREAM_REQUESTS="50", CHATSTREAM_WORKLOAD="W-code", CHATSTREAM_MAX_CONCURRENCY="3")
    result = command.run("simulate", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "50 calls" in result.stdout
    assert "3 slots" in result.stdout
