"""Whatever is sent to the two doors: no bug shows, and no place stays behind."""

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
from tests.api.house import House, open_house

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
    """Mostly a good body with a few fields of any kind; also anything else that is JSON, and anything that is not."""
    fields = st.sampled_from([*kind.model_fields, "no_such_field"])
    nearly_good = st.dictionaries(fields, VALUE, max_size=3).map(lambda changes: good | changes)
    return (nearly_good | JSON).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=60)


@pytest.mark.parametrize(
    ("path", "contents"),
    [("/chat_stream", bodies(CHAT, ChatBody)), ("/v1/chat/completions", bodies(COMPLETION, ChatCompletionBody))],
)
def test_no_body_causes_a_5xx_or_leaks_a_request(path: str, contents: st.SearchStrategy[bytes]) -> None:
    async def send(house: House, content: bytes) -> int:
        response = await house.browser().post(path, content=content)
        await asyncio.sleep(0.01)
        assert house.held == 0
        return response.status_code

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        # Opened and closed by hand: one house for all bodies.
        opening = open_house()
        house = runner.run(opening.__aenter__())
        statuses: set[int] = set()

        @settings(max_examples=250)
        @given(contents)
        def try_it(content: bytes) -> None:
            status = runner.run(send(house, content))
            assert status in (200, 400, 404)
            statuses.add(status)

        try_it()
        runner.run(opening.__aexit__(None, None, None))
    assert statuses >= {200, 400}  # the bodies are not all nonsense
