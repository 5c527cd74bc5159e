"""Events to bytes in each wire format."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.api.framing import NativeFraming
from chatstream.api.legacy import LegacyFraming
from chatstream.api.openai import ChunkFraming
from chatstream.errors import EngineError, QueueTimeout
from chatstream.types import Done, Failed, FinishReason, Queued, Started, StreamEvent, Token, Usage
from tests.api.in_process import parse_events

DONE = Done("r1", "m1", FinishReason.STOP, Usage(7, 2))


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (
            Queued("r1", 3),
            (
                'event: queued\ndata: {"request_id":"r1","position":3,"position_kind":"exact","eta_seconds":null,'
                '"eta_p90_seconds":null,"waits_for":"slot"}\nid: 1\n\n'
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
def test_a_native_event_has_exactly_these_bytes(event: StreamEvent, frame: str) -> None:
    assert NativeFraming().encode(event, 1) == frame.encode()


def test_native_events_are_numbered() -> None:
    framing = NativeFraming()
    events = (Queued("r", 1), Started("r", 0.0), Token("a"), DONE)
    body = b"".join(framing.encode(event, n) for n, event in enumerate(events, start=1))
    assert [event.id for event in parse_events(body)] == ["1", "2", "3", "4"]


@given(st.text())
def test_no_text_can_break_out_of_its_event(text: str) -> None:
    (event,) = parse_events(NativeFraming().encode(Token(text), 1))
    assert (event.kind, event.data) == ("token", {"text": text})


def legacy(*events: StreamEvent) -> bytes:
    framing = LegacyFraming()
    return b"".join(framing.encode(event, 1) or b"" for event in events)


def test_the_0_3_format_repeats_the_whole_answer_so_far() -> None:
    events = (Queued("r", 1), Started("r", 0.0), Token("ab"), Token(" cd"), DONE)
    assert legacy(*events) == b"ab<::EOS::>ab cd<::EOS::>"


def test_the_0_3_format_trims_the_answer_so_far() -> None:
    assert legacy(Token(" \n"), Token(" a "), Token("b\n"), DONE) == b"<::EOS::>a<::EOS::>a b<::EOS::>"


def test_an_empty_answer_is_one_finish_token_in_the_0_3_format() -> None:
    assert legacy(Started("r", 0.0), DONE) == b"<::EOS::>"


def test_the_0_3_format_cannot_express_a_failed_answer() -> None:
    assert LegacyFraming().encode(Failed("r", EngineError("x")), 1) is None


def chunks(*events: StreamEvent, with_usage: bool = False, with_queue_events: bool = False) -> bytes:
    framing = ChunkFraming("r1", "fake", with_usage=with_usage, with_queue_events=with_queue_events)
    return b"".join(framing.encode(event, n) for n, event in enumerate(events, start=1))


def test_a_position_is_a_comment_for_openai_clients() -> None:
    assert chunks(Queued("r1", 3)) == b": queued position=3\n\n"
    assert chunks(Queued("r1", 3, eta_seconds=12.4)) == b": queued position=3 eta=12.4\n\n"


def test_named_events_are_encoded_only_on_request() -> None:
    named = parse_events(chunks(Queued("r1", 3, 1.5, 4.0), Started("r1", 0.5), with_queue_events=True))[:2]
    queued = {
        "request_id": "r1", "position": 3, "position_kind": "exact", "eta_seconds": 1.5, "eta_p90_seconds": 4.0,
        "waits_for": "slot",
    }  # fmt: skip
    assert [(event.kind, event.data) for event in named] == [
        ("queued", queued),
        ("started", {"request_id": "r1", "waited_seconds": 0.5}),
    ]
    assert b"event:" not in chunks(Queued("r1", 3), Started("r1", 0.5), Token("x"), DONE)


def test_openai_chunks_end_with_the_reason_the_requested_usage_and_done() -> None:
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


def test_an_error_in_a_stream_is_openais_error_object_and_the_last_chunk() -> None:
    body = chunks(Failed("r1", QueueTimeout("waited 5.0 s")))
    assert body == (
        b'data: {"error":{"message":"waited 5.0 s","type":"rate_limit_error","param":null,"code":"queue_timeout"}}\n\n'
    )


def frames(event: StreamEvent, skip_parts: int = 0, **options: bool) -> list[tuple[str, str]]:
    """(id, first characters of the data) of each server-sent event of event 7 of a resumable stream."""
    settings = {"with_usage": False, "with_queue_events": False, **options}
    body = ChunkFraming("r1", "fake", with_ids=True, **settings).encode(event, 7, skip_parts).decode()
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in body.split("\n\n") if block]
    return [(block["id"], block["data"][:6]) for block in blocks]


def test_ids_of_a_resumable_stream_number_the_parts_of_an_event() -> None:
    assert frames(Token("x")) == [("7", '{"id":')]
    assert frames(DONE) == [("7.1", '{"id":'), ("7", "[DONE]")]
    assert frames(DONE, with_usage=True) == [("7.1", '{"id":'), ("7.2", '{"id":'), ("7", "[DONE]")]
    assert frames(Started("r1", 0.0), with_queue_events=True) == [("7.1", '{"requ'), ("7", '{"id":')]


def test_parts_that_the_client_has_received_are_skipped() -> None:
    assert frames(DONE, 1, with_usage=True) == [("7.2", '{"id":'), ("7", "[DONE]")]
    assert frames(DONE, 2, with_usage=True) == [("7", "[DONE]")]


def test_comments_and_chunks_of_other_streams_have_no_ids() -> None:
    resumable = ChunkFraming("r1", "fake", with_usage=False, with_queue_events=False, with_ids=True)
    assert resumable.encode(Queued("r1", 3), 1) == b": queued position=3\n\n"
    assert b"id: " not in chunks(Started("r1", 0.0), Token("x"), DONE)
