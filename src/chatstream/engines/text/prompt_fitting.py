"""Convert a prompt to tokens that fit the context: drop the oldest turns, or refuse with the numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from chatstream.engines.text.codec import Codec
from chatstream.errors import InvalidRequest, PromptTooLong
from chatstream.types import Message, PreparedPrompt, PromptInput

MAX_CHARS_PER_TOKEN = 64
"""A prompt with more characters per token of the context is refused before it is tokenised, which would take seconds.
Text has 2 to 5 characters per token; only long runs of one space come near this bound."""


def fit_prompt(
    codec: Codec, prompt: PromptInput, *, context_len: int, num_answer_tokens: int, may_drop_history: bool
) -> PreparedPrompt:
    """See `Engine.prepare`. `num_answer_tokens` of the context are reserved for the answer."""
    max_prompt_tokens = context_len - num_answer_tokens
    if max_prompt_tokens < 1:
        raise PromptTooLong(
            f"an answer of {num_answer_tokens} tokens leaves no room for a prompt in the context of {context_len}",
            param="max_new_tokens",
        )
    max_chars = context_len * MAX_CHARS_PER_TOKEN
    last = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    num_chars = len(last) if may_drop_history else _num_chars(prompt)
    if num_chars > max_chars:
        raise PromptTooLong(
            f"{num_chars} characters cannot fit the context of {context_len} tokens",
            param="prompt" if isinstance(prompt, str) else "messages",
        )
    if isinstance(prompt, str):
        token_ids = codec.encode_text(prompt)
        prepared = PreparedPrompt(tuple(token_ids))
    else:
        prepared = _encode_chat(codec, prompt, max_prompt_tokens if may_drop_history else None)
    if not prepared.token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if len(prepared.token_ids) > max_prompt_tokens:
        raise PromptTooLong(
            f"the prompt has {len(prepared.token_ids)} tokens; with {num_answer_tokens} to generate, "
            f"at most {max_prompt_tokens} fit the context of {context_len}",
            param="messages" if prepared.messages else "prompt",
        )
    return prepared


def check_prompt(token_ids: Sequence[int], vocab_size: int, context_len: int) -> None:
    """Check token ids that do not come from `fit_prompt`. Raises `InvalidRequest` or `PromptTooLong`.

    An id outside the vocabulary would end the whole process on a GPU; numpy would take a negative one from the end.
    """
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if len(token_ids) >= context_len:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens, which leaves no room in the context of {context_len}",
            param="prompt",
        )
    if not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise InvalidRequest(f"the prompt has token ids outside the model's vocabulary of {vocab_size}", param="prompt")


def _encode_chat(codec: Codec, messages: tuple[Message, ...], max_tokens: int | None) -> PreparedPrompt:
    """Drop as few of the oldest turns as needed; None: drop nothing. The rendered template is never cut."""
    num_system = next((n for n, m in enumerate(messages) if m.role != "system"), len(messages))
    head, turns = messages[:num_system], messages[num_system:]
    # A conversation must begin with a user message; many templates refuse anything else.
    starts = [n for n, m in enumerate(turns) if m.role == "user"] or [0]
    if max_tokens is None:
        starts = starts[:1] if starts[0] == 0 else [0]

    def encode(start: int) -> PreparedPrompt:
        kept = head + turns[start:]
        return PreparedPrompt(tuple(codec.encode_chat(kept)), kept, dropped_messages=start)

    low, high = 0, len(starts) - 1
    best = encode(starts[low])
    if max_tokens is None or len(best.token_ids) <= max_tokens or high == 0:
        return best
    best = encode(starts[high])
    while low + 1 < high:
        middle = (low + high) // 2
        candidate = encode(starts[middle])
        if len(candidate.token_ids) <= max_tokens:
            best, high = candidate, middle
        else:
            low = middle
    return best


def _num_chars(prompt: PromptInput) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
