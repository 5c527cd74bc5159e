"""One request inside a step loop: which tokens it has, which the model was fed, and what its reader was told."""

from __future__ import annotations

from array import array
from typing import Any

from chatstream.engines.batching.model import LoadedModel, SlotInput
from chatstream.engines.batching.prefix_cache import Tokens, as_tokens
from chatstream.engines.text.answer import Answer
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.thread.handover import Outbox
from chatstream.types import GenerationRequest, TokenDelta


class Sequence:
    """One request inside the engine: how far its prompt and its answer are."""

    def __init__(self, request: GenerationRequest, model: LoadedModel, outbox: Outbox) -> None:
        self.request = request
        self.runner = model.runner
        self.outbox = outbox
        self.answer = Answer(request, model.codec, context_len=model.runner.context_len, chat_stops=model.chat_stops)
        self.token_ids = array("q")
        """The prompt and what was generated. Packed: it is compared with others' at every newcomer."""
        self.num_prompt_tokens = len(request.prompt.token_ids)
        self.prompt_read = 0
        """Prompt tokens that were told to the reader."""
        self.sampler: Any = None
        self.slot: int | None = None
        self.num_computed = 0
        """Tokens the slot holds: a beginning of `token_ids`."""
        self.is_preempted = self.was_preempted = False

    @property
    def is_generating(self) -> bool:
        """One token has to be fed, the one that was chosen last."""
        return self.num_computed >= self.num_prompt_tokens and self.num_computed == len(self.token_ids) - 1

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def tokens(self) -> Tokens:
        """What the slot holds, or will when its prompt is read."""
        return as_tokens(self.token_ids)

    def tokens_in_slot(self) -> Tokens:
        return as_tokens(self.token_ids[: self.num_computed])

    def next_input(self, max_tokens: int) -> SlotInput:
        assert self.slot is not None
        length = len(self.token_ids)
        end = min(self.num_computed + max_tokens, length)
        return SlotInput(
            self.slot, self.num_computed, tuple(self.token_ids[self.num_computed : end]), is_last=end == length
        )

    def advance(self, next_token: SampledToken | Exception) -> TokenDelta:
        """What this token adds to the answer. Raises the exception that stands in a token's place."""
        if isinstance(next_token, Exception):
            raise next_token
        self.token_ids.append(next_token.token_id)
        return self.answer.advance(next_token, num_prompt_tokens=self._newly_read())

    def prompt_delta(self) -> TokenDelta:
        """A part of the prompt was read, and not the last one."""
        return TokenDelta("", 0, num_prompt_tokens=self._newly_read())

    def _newly_read(self) -> int:
        """Prompt tokens read since this was last asked; those that are read again after a pause do not count."""
        before, self.prompt_read = (
            self.prompt_read,
            max(self.prompt_read, min(self.num_computed, self.num_prompt_tokens)),
        )
        return self.prompt_read - before
