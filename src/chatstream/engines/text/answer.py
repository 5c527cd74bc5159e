"""One answer: converts its tokens to deltas, up to the end token, a stop string or the token limit. Pure.

For every engine that samples token ids.
"""

from __future__ import annotations

from chatstream.engines.text.codec import Codec, SampledToken
from chatstream.engines.text.detokenizer import StopStrings
from chatstream.engines.text.logprobs import token_logprobs
from chatstream.types import FinishReason, GenerationRequest, TokenDelta, Usage


class Answer:
    """Call `advance` with every token in order, until a delta has a `finish_reason`."""

    def __init__(
        self, request: GenerationRequest, codec: Codec, *, context_len: int, chat_stops: tuple[str, ...] = ()
    ) -> None:
        """`chat_stops` are stop strings for answers to conversations, in addition to those of the request."""
        sampling = request.sampling
        self._prompt_tokens = len(request.prompt.token_ids)
        remaining = context_len - self._prompt_tokens
        wanted = sampling.max_new_tokens
        self.max_new_tokens = remaining if wanted is None else min(wanted, remaining)
        self._codec = codec
        self._decoder = codec.open_decoder()
        self._stops = StopStrings(sampling.stop + (chat_stops if request.prompt.messages else ()))
        self._generated = 0

    def advance(self, token: SampledToken, *, num_prompt_tokens: int = 0) -> TokenDelta:
        """The delta of one token. An end token is not counted and has no text.

        `num_prompt_tokens`: prompt tokens processed since the previous delta.
        """
        if token.token_id in self._codec.eos_token_ids:
            usage = Usage(self._prompt_tokens, self._generated)
            return TokenDelta(self._stops.flush(), 0, FinishReason.STOP, usage, num_prompt_tokens)
        self._generated += 1
        text, reason = self._stops.push(self._decoder.push(token.token_id)), None
        if self._stops.is_hit:
            reason = FinishReason.STOP
        elif self._generated >= self.max_new_tokens:
            text, reason = text + self._stops.flush(), FinishReason.LENGTH
        return TokenDelta(
            text,
            finish_reason=reason,
            usage=Usage(self._prompt_tokens, self._generated) if reason else None,
            num_prompt_tokens=num_prompt_tokens,
            logprobs=token_logprobs(token, self._codec.token_text),
        )
