"""One answer as it grows: from tokens to what its reader gets, up to the end of the model's turn, a stop string or the
last token there is room for. Pure; every engine that samples token ids can use it."""

from __future__ import annotations

from chatstream.engines.text.codec import Codec, SampledToken
from chatstream.engines.text.detokenizer import StopStrings
from chatstream.engines.text.logprobs import text_logprobs
from chatstream.types import FinishReason, GenerationRequest, TokenDelta, Usage


class Answer:
    """Feed it every token in order, until a delta has a `finish_reason`."""

    def __init__(
        self, request: GenerationRequest, codec: Codec, *, context_len: int, chat_stops: tuple[str, ...] = ()
    ) -> None:
        """`chat_stops` end answers to conversations besides the request's own stop strings."""
        sampling = request.sampling
        self._prompt_tokens = len(request.prompt.token_ids)
        room = context_len - self._prompt_tokens
        self.max_new_tokens = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
        self._codec = codec
        self._decoder = codec.open_decoder()
        self._stops = StopStrings(sampling.stop + (chat_stops if request.prompt.messages else ()))
        self._generated = 0

    def advance(self, token: SampledToken, *, num_prompt_tokens: int = 0) -> TokenDelta:
        """What this token adds. A token that ends the answer is not counted and not told.

        `num_prompt_tokens` were read since the delta before this one.
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
            logprobs=text_logprobs(token, self._codec.token_text),
        )
