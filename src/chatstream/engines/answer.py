"""One answer as it grows: from token ids to what its reader gets, up to the end of the model's turn, a stop string or
the last token there is room for. Pure; every engine that samples token ids can use it."""

from __future__ import annotations

from chatstream.engines.detokenizer import StopStrings
from chatstream.engines.model import Codec
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
        self._eos_token_ids = codec.eos_token_ids
        self._decoder = codec.open_decoder()
        self._stops = StopStrings(sampling.stop + (chat_stops if request.prompt.messages else ()))
        self._generated = 0

    def advance(self, token_id: int) -> TokenDelta:
        """What this token adds. A token that ends the answer is not counted."""
        first = self._prompt_tokens if self._generated == 0 else 0
        if token_id in self._eos_token_ids:
            return self._last(self._stops.flush(), FinishReason.STOP, first, num_tokens=0)
        self._generated += 1
        text = self._stops.push(self._decoder.push(token_id))
        if self._stops.is_hit:
            return self._last(text, FinishReason.STOP, first)
        if self._generated >= self.max_new_tokens:
            return self._last(text + self._stops.flush(), FinishReason.LENGTH, first)
        return TokenDelta(text, num_prompt_tokens=first)

    def _last(self, text: str, reason: FinishReason, num_prompt_tokens: int, num_tokens: int = 1) -> TokenDelta:
        usage = Usage(self._prompt_tokens, self._generated)
        return TokenDelta(text, num_tokens, reason, usage, num_prompt_tokens)
