"""The promises of the sampling parameters, with the bundled model and the whole server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from tokenizers import Tokenizer

from chatstream import ChatStream, Token
from chatstream.engines.demo import CHECKPOINT, MODEL_NAME
from chatstream.errors import EngineError
from tests.e2e.server import serve

pytestmark = pytest.mark.anyio

ASKED: dict[str, Any] = {
    "model": MODEL_NAME,
    "messages": [{"role": "user", "content": "What is a slot?"}],
    "temperature": 0,
    "max_tokens": 24,
    "logprobs": True,
    "top_logprobs": 3,
}
tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(params=["thread", "process"])
async def chat_stream(request: pytest.FixtureRequest) -> AsyncIterator[ChatStream]:
    async with ChatStream(engine_in=request.param, max_concurrency=8, max_queue_size=20) as chat_stream:
        yield chat_stream


async def answer(chat_stream: ChatStream, prompt: str = "What is a slot?", **more: Any) -> str:
    events = [event async for event in chat_stream.stream(prompt, **{"max_new_tokens": 24, **more})]
    return "".join(event.text for event in events if isinstance(event, Token))


# --- log probabilities over HTTP ------------------------------------------------------------------------------------


async def whole(client: openai.AsyncOpenAI, **more: Any) -> tuple[str, list[ChatCompletionTokenLogprob], int]:
    """(text, log probabilities of each token, number of tokens)"""
    completion = await client.chat.completions.create(**{**ASKED, **more})
    (choice,) = completion.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert completion.usage is not None
    return choice.message.content or "", choice.logprobs.content, completion.usage.completion_tokens


async def test_every_token_has_log_probabilities_which_are_the_same_in_a_stream() -> None:
    with serve(ChatStream()) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            text, logprobs, num_tokens = await whole(client)
            chunks = [chunk async for chunk in await client.chat.completions.create(**ASKED, stream=True)]
            cut, logprobs_cut, num_tokens_cut = await whole(client, stop=logprobs[4].token + logprobs[5].token)
            _, warm, _ = await whole(client, temperature=2, seed=1, presence_penalty=1, extra_body={"min_p": 0.01})
    assert len(logprobs) == num_tokens == 24
    assert "".join(one.token for one in logprobs) == text
    assert b"".join(bytes(one.bytes or ()) for one in logprobs) == text.encode()
    assert all((one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob) for one in logprobs)
    by_chunk = [chunk.choices[0].logprobs for chunk in chunks]
    assert [one for found in by_chunk if found for one in found.content or ()] == logprobs
    # The tokens of the stop string have log probabilities, but their text is not in the answer.
    assert logprobs_cut == logprobs[:6]
    assert (len(logprobs_cut), cut) == (num_tokens_cut, "".join(one.token for one in logprobs[:4]))
    # The prompt is the same, so the log probabilities of the first token do not depend on the parameters.
    assert warm[0].top_logprobs == logprobs[0].top_logprobs


# --- token masks ----------------------------------------------------------------------------------------------------


class OneOf:
    """The answer is one of these texts."""

    def __init__(self, *answers: str) -> None:
        end = tokenizer.token_to_id("<|end|>")
        assert end is not None
        self._answers = [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in answers]

    def __call__(self, generated_ids: Sequence[int]) -> Any:
        count = len(generated_ids)
        mask = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
        mask[[ids[count] for ids in self._answers if ids[:count] == [*generated_ids]]] = True
        return mask


@pytest.mark.parametrize("temperature", [0.0, 2.0])
async def test_a_token_mask_limits_the_answer(chat_stream: ChatStream, temperature: float) -> None:
    answers = ("Yes.", "No, never.", "たぶん")
    texts = [await answer(chat_stream, token_mask=OneOf(*answers), temperature=temperature, seed=n) for n in range(5)]
    assert {*texts} <= {*answers}


def fails_at_the_third_token(generated_ids: Sequence[int]) -> Any:
    if len(generated_ids) == 2:
        raise KeyError("lost")


async def test_a_token_mask_that_fails_ends_only_its_own_request(chat_stream: ChatStream) -> None:
    alone = await answer(chat_stream, temperature=0.0)
    other = asyncio.create_task(answer(chat_stream, temperature=0.0))
    with pytest.raises(EngineError, match="token_mask failed: KeyError"):
        await answer(chat_stream, token_mask=fails_at_the_third_token)
    assert await other == alone


# --- the same seed --------------------------------------------------------------------------------------------------

UNKNOWN = "Xylophones, blue: 7 or 9?"
"""A prompt outside the training data: answers to known ones hardly vary with the sampling."""
WARM: tuple[dict[str, Any], ...] = (
    {"temperature": 2.0, "top_p": 1.0, "min_p": 0.002},
    {"temperature": 2.0, "top_p": 0.99, "min_p": 0.001, "frequency_penalty": 1.7},
    {"temperature": 1.7, "top_p": 1.0, "presence_penalty": 2.0, "repetition_penalty": 1.3, "logprobs": 5},
    {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": 1.0, "top_k": 40},
    {"temperature": 1.8, "token_mask": OneOf("Yes.", "No, never.", "たぶん")},
)


async def test_the_same_seed_gives_the_same_text_independent_of_other_requests(chat_stream: ChatStream) -> None:
    alone = [await answer(chat_stream, UNKNOWN, seed=n, **params) for n, params in enumerate(WARM)]
    together = await asyncio.gather(
        *(answer(chat_stream, UNKNOWN, seed=n, **params) for n, params in enumerate(WARM)),
        *(answer(chat_stream, "Tell me a story.", seed=n, temperature=2.0) for n in range(3)),
    )
    assert together[: len(WARM)] == alone
    assert len({*alone}) == len(WARM)
