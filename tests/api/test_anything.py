"""Random bodies to both APIs: no 5xx, and no request leaks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.api.bodies import Body
from chatstream.api.native import ChatBody
from chatstream.api.openai import ChatCompletionBody
from chatstream.testing import VirtualTimeLoop
from tests.api.in_process import Service, open_service

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
VALUE = (
    JSON
    | st.integers(-2, 3)
    | st.sampled_from([0.5, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, "fake", ["a"], {"type": "text"}])
    | st.builds(dict, role=st.sampled_from(["user", "assistant", "tool"]), content=st.text() | JSON).map(lambda m: [m])
)
CHAT = {"user_input": "hello"}
COMPLETION = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}


def bodies(good: dict[str, Any], kind: type[Body]) -> st.SearchStrategy[bytes]:
    """Mostly a valid body with a few random fields; also other JSON, and bytes that are no JSON."""
    fields = st.sampled_from([*kind.model_fields, "no_such_field"])
    nearly_good = st.dictionaries(fields, VALUE, max_size=3).map(lambda changes: good | changes)
    return (nearly_good | JSON).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=60)


@pytest.mark.parametrize(
    ("path", "contents"),
    [("/chat_stream", bodies(CHAT, ChatBody)), ("/v1/chat/completions", bodies(COMPLETION, ChatCompletionBody))],
)
def test_no_body_causes_a_5xx_or_leaks_a_request(path: str, contents: st.SearchStrategy[bytes]) -> None:
    async def send(service: Service, content: bytes) -> int:
        response = await service.browser().post(path, content=content)
        await asyncio.sleep(0.01)
        assert service.num_requests == 0
        return response.status_code

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        # Entered and exited by hand: one service for all bodies.
        opening = open_service()
        service = runner.run(opening.__aenter__())
        statuses: set[int] = set()

        @settings(max_examples=250)
        @given(contents)
        def try_it(content: bytes) -> None:
            status = runner.run(send(service, content))
            assert status in (200, 400, 404)
            statuses.add(status)

        try_it()
        runner.run(opening.__aexit__(None, None, None))
    assert statuses >= {200, 400}  # some bodies are valid
