"""Log probabilities as a runner knows them, by token id, into what a request is told: by text."""

from __future__ import annotations

from collections.abc import Callable

from chatstream.engines.text.codec import SampledToken
from chatstream.types import TokenLogprob


def text_logprobs(next_token: SampledToken, token_text: Callable[[int], str]) -> tuple[TokenLogprob, ...]:
    """For `TokenDelta.logprobs`: one for this token, none if nobody asked. `token_text` is that of the `Codec`."""
    if next_token.logprob is None:
        return ()
    top = tuple((token_text(token_id), logprob) for token_id, logprob in next_token.top_logprobs)
    return (TokenLogprob(token_text(next_token.token_id), next_token.logprob, top),)
