"""Events to bytes, one wire format after the other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.api.framing import LegacyFraming, NativeFraming
from chatstream.api.openai import ChunkFraming
from chatstream.errors import EngineError, QueueTimeout
from chatstream.runtime import RequestStream
from chatstream.types import Done, Failed, FinishReason, Queued, Started, StreamEvent, Token, Usage
from tests.api.house import parse_events

DONE = Done("r1", "m1", FinishReason.STOP, Usage(7, 2))


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (
            Queued("r1", 3),
            (
                'event: queued\ndata: {"request_id":"r1","position":3,"eta_seconds":null,'
                '"eta_p90_seconds":null}\nid: 1\n\n'
            ),
        ),
        (Started("r1", 1.23456), 'event: started\ndata: {"request_id":"r1","waited_seconds":1.235}\nid: 1\n\n'),
        (Token("né"), 'event: token\ndata: {"text":"né"}\nid: 1\n\n'),
        (
            DONE,
            (
                'event: done\ndata: {"request_id":"r1","message_id":"m1","finish_reason":"stop",'
                '"usage":{"prompt_tokens":7,"completion_tokens":2}}\nid: 1\n\n'
            ),
        ),
        (
            Failed("r1", EngineError("the model failed")),
            'event: error\ndata: {"code":"engine_error","message":"the model failed"}\nid: 1\n\n',
        ),
    ],
)
def test_a_native_event_is_written_to_the_byte(event: StreamEvent, frame: str) -> None:
    assert NativeFraming().encode(event) == frame.encode()


def test_native_events_are_numbered() -> None:
    framing = NativeFraming()
    body = b"".join(framing.encode(event) for event in (Queued("r", 1), Started("r", 0.0), Token("a"), DONE))
    assert [event.id for event in parse_events(body)] == ["1", "2", "3", "4"]


@given(st.text())
def test_no_text_can_break_out_of_its_event(text: str) -> None:
    (event,) = parse_events(NativeFraming().encode(Token(text)))
    assert (event.kind, event.data) == ("token", {"text": text})


def legacy(*events: StreamEvent) -> bytes:
    framing = LegacyFraming()
    return b"".join(framing.encode(event) or b"" for event in events)


def test_the_old_format_repeats_the_whole_answer_so_far() -> None:
    events = (Queued("r", 1), Started("r", 0.0), Token("ab"), Token(" cd"), DONE)
    assert legacy(*events) == b"ab<::EOS::>ab cd<::EOS::>"


def test_the_old_format_trims_the_answer_so_far() -> None:
    assert legacy(Token(" \n"), Token(" a "), Token("b\n"), DONE) == b"<::EOS::>a<::EOS::>a b<::EOS::>"


def test_an_empty_answer_is_one_finish_token_in_the_old_format() -> None:
    assert legacy(Started("r", 0.0), DONE) == b"<::EOS::>"


def test_the_old_format_has_no_way_to_say_that_an_answer_failed() -> None:
    assert LegacyFraming().encode(Failed("r", EngineError("x"))) is None


def chunks(*events: StreamEvent, with_usage: bool = False, with_queue_events: bool = False) -> bytes:
    stream = RequestStream("r1", max_buffered=1, on_closed=lambda by: None)
    framing = ChunkFraming(stream, "fake", with_usage=with_usage, with_queue_events=with_queue_events)
    return b"".join(framing.encode(event) for event in events)


def test_a_place_in_line_is_a_comment_for_openai_clients() -> None:
    assert chunks(Queued("r1", 3)) == b": queued position=3\n\n"
    assert chunks(Queued("r1", 3, eta_seconds=12.4)) == b": queued position=3 eta=12.4\n\n"


def test_named_events_come_only_when_asked_for() -> None:
    named = parse_events(chunks(Queued("r1", 3), Started("r1", 0.5), with_queue_events=True))[:2]
    assert [(event.kind, event.data) for event in named] == [
        ("queued", {"request_id": "r1", "position": 3, "eta_seconds": None, "eta_p90_seconds": None}),
        ("started", {"request_id": "r1", "waited_seconds": 0.5}),
    ]
    assert b"event:" not in chunks(Queued("r1", 3), Started("r1", 0.5), Token("x"), DONE)


def test_openai_chunks_end_with_the_reason_the_usage_if_asked_for_and_done() -> None:
    def lines(body: bytes) -> list[str]:
        return [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]

    last, done = lines(chunks(DONE))
    assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in json.loads(last)
    last, usage, done = lines(chunks(DONE, with_usage=True))
    assert json.loads(last)["usage"] is None
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert done == "[DONE]"


def test_an_error_in_mid_stream_is_openais_error_object_and_nothing_after_it() -> None:
    body = chunks(Failed("r1", QueueTimeout("waited 5.0 s")))
    assert body == (
        b'data: {"error":{"message":"waited 5.0 s","type":"rate_limit_error","param":null,"code":"queue_timeout"}}\n\n'
    )
