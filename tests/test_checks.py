"""Checks of single values: valid and invalid values of each kind, and the error messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import pytest

from chatstream.answering import ChatRequest
from chatstream.chat_stream import ChatStream
from chatstream.checks import check_choice, check_int, check_number, check_seconds
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.choose import engine_for
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.mock import MockEngine
from chatstream.engines.openvino.settings import OpenVINOSettings
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.runtime import RuntimeSettings
from chatstream.scheduler import SchedulerSettings
from chatstream.scheduler.limits.adaptive import AdaptiveLimit
from chatstream.scheduler.limits.fixed import FixedLimit
from chatstream.server import serve
from chatstream.sessions import SessionSettings
from chatstream.simulation import ClientBehaviour, EngineModel
from chatstream.testing import FakeEngine
from chatstream.tuning.sweep import SweepSettings
from chatstream.types import SamplingParams

NO_NUMBERS = ("1", "", None, True, nan, inf, -inf, [1], 1j, 10**400)
LONGEST_MESSAGE = 300


def refusal(check: Callable[..., object], *arguments: object, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments, **named)
    assert caught.value.param == arguments[0]
    return caught.value.message


def test_a_whole_number_is_an_int_within_its_bounds() -> None:
    for good in (1, 64):
        check_int("slots", good, at_least=1, at_most=64)
    check_int("slots", 10**9, at_least=1)
    for wrong in (0, 65, -1, 1.0, *NO_NUMBERS):
        assert refusal(check_int, "slots", wrong, at_least=1, at_most=64).startswith(
            "slots must be a whole number between 1 and 64, not "
        )
    assert refusal(check_int, "slots", "x", at_least=1) == "slots must be a whole number, at least 1, not 'x'"


def test_a_number_is_finite_and_within_its_bounds() -> None:
    for good in (1, 0.001):
        check_number("rate", good, above=0)
    for wrong in (0, -0.5, *NO_NUMBERS):
        assert refusal(check_number, "rate", wrong, above=0).startswith("rate must be a number above 0, not ")
    for good in (0, 0.5, 1.0):
        check_number("share", good, at_least=0, at_most=1)
    for wrong in (-0.001, 1.001, *NO_NUMBERS):
        assert refusal(check_number, "share", wrong, at_least=0, at_most=1).startswith(
            "share must be a number between 0 and 1, not "
        )
    for good in (0.001, 1):
        check_number("top_p", good, above=0, at_most=1)
    assert refusal(check_number, "top_p", 0, above=0, at_most=1) == (
        "top_p must be a number above 0 and at most 1, not 0"
    )
    check_number("load", 0.0, at_least=0)
    assert refusal(check_number, "load", nan, at_least=0) == "load must be a number, at least 0, not nan"


def test_a_time_is_above_0_or_may_be_0_where_the_setting_allows_it() -> None:
    for good in (1, 0.001):
        check_seconds("wait_s", good)
    for wrong in (0, -1.0, *NO_NUMBERS):
        assert refusal(check_seconds, "wait_s", wrong).startswith("wait_s must be a number of seconds above 0, not ")
    check_seconds("wait_s", 0, at_least=0)
    assert refusal(check_seconds, "wait_s", -1, at_least=0) == "wait_s must be a number of seconds, at least 0, not -1"
    check_seconds("wait_s", 3600.0, at_most=3600.0)
    assert refusal(check_seconds, "wait_s", 3601, at_most=3600.0) == (
        "wait_s must be a number of seconds above 0 and at most 3,600, not 3601"
    )


def test_a_choice_is_one_of_the_words() -> None:
    for good in ("auto", "on"):
        check_choice("prepack", good, ("auto", "on", "off"))
    for wrong in ("", "ON", "auto, on", None, 1, True, ["on"]):
        assert refusal(check_choice, "prepack", wrong, ("auto", "on", "off")) == (
            f"prepack must be one of auto, on, off, not {wrong!r}"
        )


def test_none_is_valid_only_where_the_setting_allows_it() -> None:
    check_int("n", None, at_least=1, or_none=True)
    check_number("n", None, above=0, or_none=True)
    check_seconds("n", None, or_none=True)
    check_choice("n", None, ("a",), or_none=True)
    assert refusal(check_int, "n", 0, at_least=1, or_none=True) == "n must be a whole number, at least 1, not 0"


def test_an_invalid_field_of_a_request_raises_invalid_request() -> None:
    for check in (
        lambda: check_int("top_k", 0, at_least=1, error=InvalidRequest),
        lambda: check_number("top_k", 0, above=0, error=InvalidRequest),
        lambda: check_seconds("top_k", 0, error=InvalidRequest),
    ):
        with pytest.raises(InvalidRequest) as caught:
            check()
        assert caught.value.param == "top_k"


LONG = ("x" * 10**6, "\x1b[31m\n" * 10**5, [["x" * 99] * 99] * 99, dict.fromkeys(range(999), "x" * 99), 10**5000)


def test_the_message_is_one_short_line_for_any_value() -> None:
    for sent in LONG:
        messages = [
            refusal(check_int, "n", sent, at_least=1, at_most=64),
            refusal(check_seconds, "n", sent, at_most=60),
            refusal(check_choice, "n", sent, ("a", "b")),
        ]
        assert all(len(message) < LONGEST_MESSAGE and message.isprintable() for message in messages)


def never_loaded() -> LoadedModel:
    raise AssertionError("nothing is loaded before the settings are checked")


step_engine = partial(StepEngine, "scripted", never_loaded)
adaptive_limit = partial(AdaptiveLimit, initial=4, floor=1, ceiling=8, target_itl_s=0.1)
COUNTS: tuple[tuple[Callable[..., object], tuple[str, ...]], ...] = (
    (SchedulerSettings, ("max_concurrency", "max_queue_size", "max_attempts", "min_concurrency", "slice_tokens")),
    (FixedLimit, ("value",)),
    (adaptive_limit, ("initial", "floor")),
    (RuntimeSettings, ("max_buffered_tokens", "max_resume_bytes_per_request", "max_resume_bytes")),
    (ChatStream, ("max_body_bytes", "max_concurrency", "max_new_tokens")),
    (SessionSettings, ("max_conversations", "max_turns", "max_chars", "max_total_chars")),
    (step_engine, ("max_prompt_tokens_per_step", "max_undelivered")),
    (MockEngine, ("max_undelivered",)),
    (LoadSettings, ("context_len", "num_threads", "prefix_cache_bytes")),
    (OpenVINOSettings, ("context_len", "num_threads", "step_tokens")),
    (SweepSettings, ("max_streams", "prompt_tokens", "answer_tokens")),
    (ClientBehaviour, ("max_attempts",)),
    (EngineModel, ("prefill_chunk_tokens",)),
)
NUMBERS: tuple[tuple[Callable[..., object], tuple[str, ...]], ...] = (
    (SchedulerSettings, ("max_wait_s", "itl_target_s", "stall_timeout_s")),
    (adaptive_limit, ("target_itl_s",)),
    (RuntimeSettings, ("reader_stall_timeout_s", "position_interval_s", "keepalive_s", "resume_grace_s")),
    (ChatStream, ("grace_s", "temperature")),
    (partial(serve, ChatStream(engine=MockEngine()), port=0), ("grace_s",)),
    (SessionSettings, ("idle_s",)),
    (step_engine, ("step_timeout_s",)),
    (MockEngine, ("initial_wait_s", "time_per_token_s")),
    (FakeEngine, ("step_s", "prefill_s")),
    (OpenVINOSettings, ("kv_memory_gib",)),
    (SweepSettings, ("seconds", "itl_target_s")),
    (ClientBehaviour, ("retry_delay_s", "patience_s")),
    (EngineModel, ("prefill_tokens_per_s", "time_per_token_s", "slowdown_per_slot")),
)
CHOICES: tuple[tuple[Callable[..., object], tuple[str, ...]], ...] = (
    (SchedulerSettings, ("policy", "adaptive")),
    (engine_for, ("engine", "engine_in")),
    (MockEngine, ("type",)),
    (LoadSettings, ("dtype", "device", "prepack", "cuda_graphs")),
    (OpenVINOSettings, ("dtype",)),
)
PARAM_OF = {
    (FixedLimit, "value"): "max_concurrency",
    (adaptive_limit, "initial"): "max_concurrency",
    (adaptive_limit, "floor"): "min_concurrency",
    (adaptive_limit, "target_itl_s"): "itl_target_s",
    (MockEngine, "type"): "mock_type",
    (MockEngine, "initial_wait_s"): "mock_initial_wait",
    (MockEngine, "time_per_token_s"): "mock_time_per_token",
}
"""The error names the option that the operator set."""
SETTINGS = [
    (make, name, wrongs)
    for table, wrongs in (
        (COUNTS, ("1", True, 1.5, nan, inf)),
        (NUMBERS, ("1", True, nan, inf)),
        (CHOICES, ("loud", True, 1, ["auto"])),
    )
    for make, names in table
    for name in names
]


@pytest.mark.parametrize(("make", "name", "wrongs"), SETTINGS, ids=[name for _, name, _ in SETTINGS])
def test_a_setting_refuses_values_of_another_type(
    make: Callable[..., object], name: str, wrongs: tuple[object, ...]
) -> None:
    """A str for a number raised a TypeError, at once or at the first request; a bool or a float passed as a count."""
    for wrong in wrongs:
        with pytest.raises(ConfigError) as caught:
            make(**{name: wrong})
        assert caught.value.param == PARAM_OF.get((make, name), name)


def test_the_target_of_a_step_may_be_infinite() -> None:
    """Without a finite target, a step prefills all prompt tokens."""
    step_engine(itl_target_s=inf)
    for wrong in ("1", True, nan, -inf, 0):
        with pytest.raises(ConfigError, match="itl_target_s"):
            step_engine(itl_target_s=wrong)


SAMPLING = SamplingParams.__dataclass_fields__
REQUEST_FIELDS: dict[str, Callable[[Any], object]] = {
    **{name: partial(lambda name, value: SamplingParams(**{name: value}), name) for name in SAMPLING},
    "priority": lambda value: ChatRequest(priority=value),
    "max_wait_seconds": lambda value: ChatRequest(max_wait_s=value),
}


@pytest.mark.parametrize("param", REQUEST_FIELDS)
def test_a_field_of_a_request_refuses_values_of_another_type(param: str) -> None:
    for wrong in ("1", True, nan, inf, *LONG):
        with pytest.raises(InvalidRequest) as caught:
            REQUEST_FIELDS[param](wrong)
        assert caught.value.param == param
        assert len(caught.value.message) < LONGEST_MESSAGE
