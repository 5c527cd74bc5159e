"""The benchmarks run and report missed goals. The measured values are not checked here."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chatstream.engines.base import Capacity
from chatstream.engines.mock import MockEngine
from chatstream.engines.process.environment import for_computing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCHEDULER = BENCHMARKS / "scheduler.py"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str, benchmark: Any) -> None:
    """Two benchmarks failed to start after a change of the step loop's types, unnoticed."""
    benchmark(name)


def test_two_sequences_in_the_step_loop_are_never_two_tokens_apart(benchmark: Any) -> None:
    num_steps, num_tokens, largest, num_violations = benchmark("step_loop_fairness").measure_steps(300)
    assert num_tokens > num_steps >= 300  # several tokens per step
    assert largest <= 1
    assert num_violations == 0


def test_the_demo_model_is_timed_together_with_others(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_model = benchmark("demo_model")
    monkeypatch.setattr(demo_model, "ROUNDS", 1)
    assert demo_model.decode_step_s(2, demo_model.SamplingParams(temperature=0.0, seed=0)) > 0
    assert demo_model.prefill_s(8) > 0


def run(tmp_path: Path, *options: str) -> Any:
    """The benchmark's report for 50 waiting clients."""
    report = tmp_path / "figures.json"
    command = [sys.executable, str(SCHEDULER), "--json", str(report), "--waiting", "50", "--seconds", "0.2", *options]
    done = subprocess.run([*command, "--rounds", "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_many_clients_wait_over_real_sockets_and_disconnect(tmp_path: Path) -> None:
    # On a busy machine no answer may progress within a fifth of a second.
    (round_,) = run(tmp_path, "--only", "M4", "--only", "M6", "--seconds", "1")["sockets"]
    assert round_["waiting"]["num_waiting"] == 50
    assert round_["waiting"]["errors"] == {}
    assert round_["waiting"]["gaps_crowded"]["count"] > 0


def test_positions_are_sent_at_every_rate(tmp_path: Path) -> None:
    *rates, broadcast = run(tmp_path, "--only", "M8")["position_updates"]
    assert len(rates) == 4
    assert broadcast["messages_per_change"] == 50


def test_the_simulator_is_timed_with_and_without_an_slo(tmp_path: Path) -> None:
    (plain,), (judged,) = run(tmp_path, "--only", "M9", "--quick")["simulated_requests_per_s"].values()
    assert min(plain, judged) > 0


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a benchmark by its name."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # demo_model sets it for its process, here the test process
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def scheduler(benchmark: Any) -> Any:
    return benchmark("scheduler")


def printed(show: Any, *arguments: Any) -> dict[str, str]:
    """The goal column of each row that has a goal, and the errors."""
    out = io.StringIO()
    show(Console(width=200, file=out), *arguments)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines()]
    errors = re.findall(r"^(errors): .* \((.*)\)$", out.getvalue(), re.MULTILINE)
    return {cells[0]: cells[-1] for cells in rows if cells and cells[-1]} | dict(errors)


def took(p50_us: float, p99_us: float = 0.0) -> dict[str, float]:
    return {"p50_us": p50_us, "p99_us": p99_us, "p50_us_lowest": p50_us, "p50_us_highest": p50_us}


def test_a_missed_goal_of_an_operation_is_reported(scheduler: Any) -> None:
    figures = {
        "M1 one token: account + event": took(5.0),
        "M2 submit -> admitted": took(10.0, 201.0),
        "M2 submit -> rejected": took(10.0, 199.0),
        "M3 cancel one of 10,000": took(5.1),
        "baseline: deque.remove": took(1e6),
        "M7 lifecycle: arrive, start, end": took(33.4),
    }
    assert printed(scheduler.show_operations, figures, "here") == {
        "M1 one token: account + event": "goal 5 µs",
        "M2 submit -> admitted": "goal 30 µs, p99 200 µs, missed",
        "M2 submit -> rejected": "goal 30 µs, p99 200 µs",
        "M3 cancel one of 10,000": "goal 5 µs, missed",
        "M7 lifecycle: arrive, start, end": "goal 30,000 per second, missed",
    }


def test_a_missed_goal_of_position_updates_is_reported(scheduler: Any) -> None:
    tellings = [
        scheduler.position_updates.UpdateCost(rate, 9.0, us, 1.0) for rate, us in ((10, 21.0), (100, 19.0), (None, 9e9))
    ]
    assert printed(scheduler.show_position_updates, tellings, 10_000) == {
        "M8 10 changes per second": "goal 20 µs, missed",
        "M8 100 changes per second": "goal 20 µs",
    }


@pytest.mark.parametrize(("per_s", "goal"), [(10_000.0, "goal 10,000"), (9_999.0, "goal 10,000, missed")])
def test_a_missed_goal_of_the_simulator_is_reported(scheduler: Any, per_s: float, goal: str) -> None:
    """The median of the rounds counts."""
    rounds = {"plain": [1.0, per_s, 1e6], "with an SLO": [1.0]}
    assert printed(scheduler.show_simulating, rounds, "here") == {"M9 plain": goal}


@pytest.mark.parametrize(("factor", "end"), [(0.99, ""), (1.01, ", missed")])
def test_missed_goals_over_sockets_are_reported(scheduler: Any, factor: float, end: str) -> None:
    sockets = scheduler.sockets
    others = dict.fromkeys((field.name for field in fields(sockets.Waiting)), 0.0)
    waiting = sockets.Waiting(
        **others
        | {
            "num_waiting": 10_000,
            "errors": {"reset": 1} if end else {},
            "rss_kib_each": 64 * factor,
            "refresh_max_s": 2 * factor,
            "gaps_alone": sockets.Gaps(p50_ms=20.0, p99_ms=20.0, max_ms=20.0, count=1),
            "gaps_crowded": sockets.Gaps(p50_ms=20.0, p99_ms=22.0 * factor, max_ms=40.0, count=1),
        }
    )
    freed = sockets.Freed(from_first_s=0.15 * factor, from_kill_s=9.0)
    disconnect = sockets.MassDisconnect(
        freed=freed, baseline=freed, freed_at_once=freed, baseline_at_once=freed, max_gap_ms=0.0
    )
    assert printed(scheduler.show_sockets, [(waiting, disconnect)], "here") == {
        "M6 server memory, KiB per connection": f"goal 64{end}",
        "longest time between two positions, s": f"goal 2{end}",
        "increase of p99, %": f"goal 10{end}",
        "M4 all disconnect: queue empty after, ms": f"goal 150{end}",
        "errors": f"goal none{end}",
    }


@pytest.fixture
def engines(benchmark: Any) -> Any:
    """A function that imports a part of the engine benchmark by its name."""
    return lambda name: benchmark(f"engines_{name}")


def test_a_round_is_steady_while_all_streams_generate(engines: Any) -> None:
    # Two tokens a second each; the second stream starts and ends one second later.
    early, late = [1.0, 1.5, 2.0, 2.5, 3.0], [2.0, 2.5, 3.0, 3.5, 4.0]
    found = engines("measures").figures([early, late])
    assert found.decode_tokens_per_s == 4.0  # 4 tokens between 2 s and 3 s
    assert (found.itl_p50_s, found.itl_p99_s) == (0.5, 0.5)
    assert found.ttft_s == 1.5


def test_an_engine_whose_streams_never_ran_together_has_no_steady_speed(engines: Any) -> None:
    found = engines("measures").figures([[1.0, 2.0], [3.0, 4.0]])
    assert found.decode_tokens_per_s is None


def test_a_median_lies_between_the_two_in_the_middle(engines: Any) -> None:
    quantile = engines("measures").quantile
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([float(n) for n in range(1, 101)], 0.99) == pytest.approx(99.01)
    assert quantile([], 0.5) is None


def test_the_limit_is_memory_for_few_streams_and_computing_for_many(engines: Any) -> None:
    limit = engines("measures").Limit(1000, 1, num_parameters=500, read_bytes_per_s=1e4, flops_per_s=1e5)
    assert limit.tokens_per_s(1, context_tokens=250) == pytest.approx(8.0)  # 1,250 bytes take an eighth of a second
    assert limit.tokens_per_s(100, context_tokens=0) == pytest.approx(100.0)  # 100,000 operations take a second


@pytest.mark.parametrize(("ours", "verdict"), [(100.0, "reached"), (99.0, "missed")])
def test_a_missed_goal_of_an_engine_is_reported(engines: Any, ours: float, verdict: str) -> None:
    measures = engines("measures")

    def rounds(*speeds: float) -> Any:
        return [measures.Figures(speed, 0.1, 0.1, 0.1) for speed in speeds]

    measured = {("ours, thread", 8): rounds(10.0, ours, 1e6), ("round-robin", 8): rounds(10.0, 10.0, 10.0)}
    found = {goal.what: goal for goal in measures.goals(measured, {1: 1.0, 8: 1e3}, {}, {}, "")}
    assert found["8 streams ÷ round-robin"].verdict == verdict  # the median of 1, ours ÷ 10 and 100,000
    assert found["32 streams ÷ round-robin"].verdict == "not measured"
    assert found["share of the limit, 8 streams"].found == pytest.approx(ours / 1e3)


class RecordingWorker:
    """Replaces the worker process: one token a second for each stream, faster during /health requests."""

    def __init__(self, label: str, asked: list[tuple[str, int, bool]]) -> None:
        self._label, self._asked = label, asked

    def ask(self, *, prompts: Any = (), answer_tokens: int = 0, probe: bool = False) -> Any:
        if self._label == "machine":
            return {"read_bytes_per_s": 1e9, "flops_per_s": 1e12}
        if answer_tokens > 4:  # fewer tokens: a trial run
            self._asked.append((self._label, answer_tokens, probe))
        if self._label == "llama.cpp":
            raise RuntimeError("Traceback\nhas memory for 1 at once, not for 2")
        step_s = 0.5 if probe else 1.0
        return {"times": [[step_s * (n + 1) for n in range(answer_tokens)] for _ in prompts], "health_s": [0.001]}


def test_the_report_names_engines_with_one_round_and_those_left_out(
    engines: Any, benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked, environments = benchmark("engines"), [], {}
    checkpoint = engines("checkpoints").Checkpoint("tiny", tmp_path, "bfloat16", 1000, 1, 500, 8, 400)
    monkeypatch.setattr(run, "make_checkpoint", lambda *_: checkpoint)

    def open_worker(stack: object, work: Path, peer: Any) -> RecordingWorker:
        environments[peer.label] = peer.environment
        return RecordingWorker(peer.label, asked)

    monkeypatch.setattr(run, "open_worker", open_worker)
    command = "--parts peers --peers rr cb llama steps http --once cb --rounds 2 --streams 8 --llama-python python"
    run.main([*command.split(), "--work", str(tmp_path), "--output", str(tmp_path)])
    report = (tmp_path / "engines.md").read_text()
    names = [line.split(" | ")[0].removeprefix("| ") for line in report.splitlines() if " | 8 |" in line]
    assert names == ["round-robin", "HF continuous batching ¹", "ours, bare steps"]
    assert "¹ Not in each of the 2 rounds." in report
    assert "Left out: llama.cpp (has memory for 1 at once, not for 2)." in report
    # Compared peers get answers of equal length; /health is not requested while HTTP is timed.
    assert [one for one in asked if one[0] == "ours, HTTP"] == [
        ("ours, HTTP", 128, False),
        ("ours, HTTP", 128, True),
    ] * 2
    assert ("ours, bare steps", 128, False) in asked
    assert environments["ours, bare steps"] == for_computing(os.environ)  # like the engine of `serve`
    assert environments["round-robin"] == {}
    assert "| ours, HTTP | 16 | 16.0 (16.0 – 16.0) |" in report


def test_the_limit_uses_the_measured_context_lengths(engines: Any, tmp_path: Path) -> None:
    report, measures = engines("report"), engines("measures")
    model = report.ModelResults(engines("checkpoints").Checkpoint("tiny", tmp_path, "bfloat16", 1000, 10, 1, 8, 400))
    model.limits.append({"read_bytes_per_s": 1e6, "flops_per_s": 1e12})
    for answer_tokens in (10, 100):
        model.rounds.append(report.PeerRound("x", 1, answer_tokens, 0, measures.Figures(1.0, 0.1, 0.1, 0.1)))
    assert model.limits_by_streams() == {1: pytest.approx(1e6 / (1000 + 10 * (64 + 50)))}


def test_an_engine_with_too_few_slots_is_not_measured(engines: Any) -> None:
    peers = engines("peers")

    class Small(MockEngine):
        capacity = Capacity(max_concurrency=2)

    with peers.through(Small()) as generate, pytest.raises(RuntimeError, match="for 2 at once, not for 3"):
        generate([[1], [2], [3]], 4)


def test_every_peer_generates_the_requested_number_of_tokens(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    checkpoints, peers = engines("checkpoints"), engines("peers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 400}
    monkeypatch.setitem(checkpoints.SHAPES, "tiny", ("qwen3", shape))
    checkpoint = checkpoints.make_checkpoint("tiny", "float32", tmp_path)
    assert checkpoint.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    prompts = checkpoints.make_prompts(3, seed=0, vocab_size=checkpoint.vocab_size)
    path = str(checkpoint.path)
    ways = [
        peers.round_robin(path, "float32"),
        peers.padded_generate(path, "float32"),
        peers.our_steps(path, 128),
        peers.our_engine(path, 128, in_process=False),
    ]
    for way in ways:
        with way as generate:
            times = generate(prompts, 5)["times"]
        assert [len(stream) for stream in times] == [5, 5, 5]
        assert all(stream == sorted(stream) for stream in times)
