"""Text to tokens and back with a Hugging Face tokenizer: chat template, end-of-answer tokens, incremental decoding."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chatstream.engines.text.chat_template import PLAIN_CHAT_STOPS, ForgeryGuard, plain_chat
from chatstream.engines.text.detokenizer import Decoder, TokenizersDecoder, TokenTexts
from chatstream.errors import InvalidRequest
from chatstream.types import Message

logger = logging.getLogger(__name__)


class TransformersCodec:
    """A `Codec` (engines/text/codec.py). Safe to use from several threads.

    `transformers` sets truncation on the one shared `tokenizers.Tokenizer` before it encodes, and older releases of
    `tokenizers` refuse any use while another thread does that ("Already borrowed"). So encoding takes a lock, and
    decoding, once a token in the engine thread, uses a copy that is never changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> None:
        self.eos_token_ids = eos_token_ids(tokenizer, generation_config)
        self._tokenizer: Any = tokenizer
        self._lock = threading.Lock()
        added: Any = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special} | {*tokenizer.all_special_tokens}
        template = str(tokenizer.chat_template or "")
        self._guard = ForgeryGuard(special, [token.content for token in added.values()], template)
        self._decoding_tokenizer = _copy_of_backend(tokenizer)
        self._token_texts = TokenTexts(partial(self._decode, skip_special_tokens=False))
        self.chat_stops: tuple[str, ...] = ()
        """Text that ends an answer to a conversation. Empty with a chat template, which has an end-of-turn token."""
        if not self._has_template():
            self.chat_stops = PLAIN_CHAT_STOPS
            logger.warning("the tokenizer has no chat template: conversations are written as 'User: ...', 'Assistant:'")

    def encode_text(self, text: str) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text, verbose=False))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the start of the answer.

        The text of a message never becomes a special token; other text is encoded as the tokenizer itself does.
        Raises `InvalidRequest` for an empty conversation and for one that the chat template refuses.
        """
        if not messages:
            raise InvalidRequest("there must be at least one message", param="messages")
        if not self._has_template():
            with self._lock:
                return list(self._tokenizer.encode(plain_chat(messages), split_special_tokens=True, verbose=False))
        conversation = [{"role": message.role, "content": message.content} for message in self._guard.guard(messages)]
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
                # The template's output already contains the special tokens.
                return [
                    token_id
                    for piece in self._guard.pieces(text)
                    for token_id in self._tokenizer.encode(piece, add_special_tokens=False, verbose=False)
                ]
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error

    def open_decoder(self) -> Decoder:
        if self._decoding_tokenizer is not None:
            return TokenizersDecoder(self._decoding_tokenizer)
        return PrefixDecoder(partial(self._decode, skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        return self._token_texts.of(token_id)

    def _decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if self._decoding_tokenizer is not None:
            return self._decoding_tokenizer.decode(token_ids, skip_special_tokens)
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)


class PrefixDecoder:
    """A `Decoder` over any function from token ids to text, for tokenizers written in Python.

    The text of a token can depend on its neighbours. So the tokens of the last piece are decoded with and without the
    new tokens, and the difference is the next piece, as in vLLM and TGI. While the text ends in U+FFFD, which an
    incomplete character decodes to, it is withheld.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        """The tokens of the last piece."""
        self._context_text = ""
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._decode(self._context + self._new)
        if len(text) <= len(self._context_text) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._context_text) :]
        self._context, self._new = self._new, []
        self._context_text = self._decode(self._context)
        return piece


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Return all tokens that end an answer: those of the checkpoint's generation config and the tokenizer's own."""
    values: Any = [getattr(generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(token_id) for value in values for token_id in _as_ids(value))


def _as_ids(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value


def _copy_of_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    try:
        return Tokenizer.from_str(backend.to_str())
    except Exception:
        # A tokenizer with parts in Python cannot be copied; it decodes under the lock.
        return None
