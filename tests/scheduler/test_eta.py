"""When those who wait will start: what is promised of the estimates, and how good they are on a simulated line."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler.eta import Eta, EtaEstimator, play, rounded, smoothed
from chatstream.scheduler.lengths import NUM_DRAWS, LengthHistory, Lengths
from chatstream.scheduler.pace import Prefill, TokenPace
from chatstream.scheduler.request import Arrival, LiveRequest
from tests.scheduler.line_simulation import Figures, Line, Told, conv_jobs, figures


def request(seq: int = 0, *, admitted_s: float = 0.0, **details: object) -> LiveRequest:
    return LiveRequest(Arrival(request_id=str(seq), **details), seq, admitted_s)  # type: ignore[arg-type]


def served(estimator: EtaEstimator, length: int, *, pace_s: float = 0.1, prefill_s: float = 1.0, **details: object) -> None:
    """One generation from start to end, alone on the engine."""
    one = request(**details)
    estimator.on_started(one, 0.0)
    estimator.on_tokens(one, 1, prefill_s)
    one.generated_tokens, one.last_progress_s = 1, prefill_s
    end_s = prefill_s + (length - 1) * pace_s
    if length > 1:
        estimator.on_tokens(one, length - 1, end_s)
        one.generated_tokens, one.last_progress_s = length, end_s
    estimator.on_ended(one, True, end_s)


def experienced(lengths: list[int], **details: object) -> EtaEstimator:
    estimator = EtaEstimator()
    for length in lengths:
        served(estimator, length, **details)
    return estimator


# --- how good it is ------------------------------------------------------------------------------------------------


def measured(told: list[Told], *, since: float, num: int) -> tuple[Figures, Figures]:
    told = [t for t in told if t.number >= since * num]
    return figures(told), figures(told, gradio=True)


def test_a_loaded_line_is_told_better_than_by_its_length() -> None:
    ours, gradio = measured(Line().run(conv_jobs(Random(1), 2000)), since=0.1, num=2000)
    assert ours.median_abs_error < min(0.19, gradio.median_abs_error)
    assert ours.mae < min(0.18, gradio.mae)
    assert abs(ours.bias) < 0.06 < -gradio.bias
    assert abs(ours.coverage - 0.9) < 0.03


def test_longer_answers_are_noticed_within_some_thirty_of_them() -> None:
    """Gradio's mean of everything that ever was is still far too short at the end."""
    jobs = conv_jobs(Random(1), 2000, factor=lambda progress: 1.0 if progress < 0.5 else 1.8)
    ours, gradio = measured(Line(max_queue_size=22).run(jobs), since=0.5, num=2000)
    assert ours.median_abs_error < 0.14 < 0.25 < gradio.median_abs_error
    assert abs(ours.bias) < 0.05
    assert gradio.bias < -0.2
    assert abs(ours.coverage - 0.9) < 0.04
