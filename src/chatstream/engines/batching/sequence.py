"""One request in the step loop: its tokens, how many of them are computed, and how many are reported to the reader."""

from __future__ import annotations

from array import array
from typing import Any

from chatstream.engines.batching.model import LoadedModel, SlotInput
from chatstream.engines.batching.prefix_cache import Tokens, as_tokens
from chatstream.engines.text.answer import Answer
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.thread.handover import DeltaBuffer
from chatstream.types import GenerationRequest, TokenDelta


class Sequence:
    """One request inside the engine: the progress of its prompt and its answer."""

    def __init__(self, request: GenerationRequest, model: LoadedModel, buffer: DeltaBuffer) -> None:
        self.request = request
        self.runner = model.runner
        self.buffer = buffer
        self.answer = Answer(request, model.codec, context_len=model.runner.context_len, chat_stops=model.chat_stops)
        self.token_ids = array("q")
        """Prompt and generated tokens. Packed, because every new sequence is compared with it."""
        self.num_prompt_tokens = len(request.prompt.token_ids)
        self.num_reported = 0
        """Prompt tokens that were reported to the reader as processed."""
        self.sampler: Any = None
        self.slot: int | None = None
        self.num_computed = 0
        """The first tokens of `token_ids` whose state is in the slot."""
        self.is_preempted = self.was_preempted = False

    @property
    def is_generating(self) -> bool:
        """The next input is exactly one token, the one sampled last."""
        return self.num_computed >= self.num_prompt_tokens and self.num_computed == len(self.token_ids) - 1

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def tokens(self) -> Tokens:
        """All tokens, computed or not."""
        return as_tokens(self.token_ids)

    def tokens_in_slot(self) -> Tokens:
        return as_tokens(self.token_ids[: self.num_computed])

    def next_input(self, max_tokens: int) -> SlotInput:
        """The next tokens to compute, at most `max_tokens`. Requires a slot."""
        assert self.slot is not None
        length = len(self.token_ids)
        end = min(self.num_computed + max_tokens, length)
        return SlotInput(
            self.slot, self.num_computed, tuple(self.token_ids[self.num_computed : end]), is_last=end == length
        )

    def advance(self, next_token: SampledToken | Exception) -> TokenDelta:
        """Append a sampled token and return its delta. An exception instead of a token is raised."""
        if isinstance(next_token, Exception):
            raise next_token
        self.token_ids.append(next_token.token_id)
        return self.answer.advance(next_token, num_prompt_tokens=self._take_unreported())

    def prompt_delta(self) -> TokenDelta:
        """The delta of a step that computed a part of the prompt, but not its end."""
        return TokenDelta("", 0, num_prompt_tokens=self._take_unreported())

    def _take_unreported(self) -> int:
        """Prompt tokens computed since the last call. Tokens computed again after a preemption do not count."""
        before, self.num_reported = (
            self.num_reported,
            max(self.num_reported, min(self.num_computed, self.num_prompt_tokens)),
        )
        return self.num_reported - before
