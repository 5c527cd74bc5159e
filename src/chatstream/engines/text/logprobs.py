"""Convert log probabilities by token id, from a runner, to log probabilities by text, for clients."""

from __future__ import annotations

from collections.abc import Callable

from chatstream.engines.text.codec import SampledToken
from chatstream.types import TokenLogprob


def token_logprobs(next_token: SampledToken, token_text: Callable[[int], str]) -> tuple[TokenLogprob, ...]:
    """The value of `TokenDelta.logprobs` for one token; empty if not requested. `token_text`: `Codec.token_text`."""
    if next_token.logprob is None:
        return ()
    top = tuple((token_text(token_id), logprob) for token_id, logprob in next_token.top_logprobs)
    return (TokenLogprob(token_text(next_token.token_id), next_token.logprob, top),)
