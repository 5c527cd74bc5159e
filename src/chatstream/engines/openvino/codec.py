"""Text to tokens and back, with the tokenizer files of an export. Needs no transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from chatstream.engines.text.chat_template import PLAIN_CHAT_STOPS, ChatTemplate, ForgeryGuard, plain_chat
from chatstream.engines.text.detokenizer import Decoder, TokenizersDecoder, TokenTexts
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import Message

logger = logging.getLogger(__name__)


class ExportedCodec:
    """A `Codec` (engines/text/codec.py) over `tokenizer.json`, `tokenizer_config.json` and the chat template."""

    def __init__(self, directory: Path, eos_token_ids: Iterable[int] = ()) -> None:
        """`eos_token_ids`: the checkpoint's end tokens, in addition to the tokenizer's own.

        Raises `ConfigError` for missing or broken files.
        """
        self._tokenizer = _tokenizer(directory)
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = _named_special_tokens(config)
        eos_token_id = self._tokenizer.token_to_id(special_tokens.get("eos_token", ""))
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos_token_id} if eos_token_id is not None else set())
        source = _template_source(directory, config)
        self._template = ChatTemplate(source, **special_tokens) if source else None
        self.chat_stops: tuple[str, ...] = ()
        """Stop strings of the plain format. Empty if there is a chat template, whose end-of-turn token ends an
        answer."""
        if self._template is None:
            self.chat_stops = PLAIN_CHAT_STOPS
            logger.warning("the export has no chat template: conversations are written as 'User: ...', 'Assistant:'")
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        self._guard = ForgeryGuard(special, [token.content for token in added], source)
        self._token_texts = TokenTexts(partial(self._tokenizer.decode, skip_special_tokens=False))

    def encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template. The text of a message never becomes a special token."""
        if not messages:
            raise InvalidRequest("there must be at least one message", param="messages")
        guarded = self._guard.guard(messages)
        # A template writes the special tokens itself; without one the tokenizer adds those at the start of a text.
        rendered = self._template.render(guarded) if self._template else plain_chat(guarded)
        return [
            token_id
            for n, piece in enumerate(self._guard.pieces(rendered))
            for token_id in self._tokenizer.encode(piece, add_special_tokens=self._template is None and n == 0).ids
        ]

    def token_text(self, token_id: int) -> str:
        return self._token_texts.of(token_id)

    def open_decoder(self) -> Decoder:
        return TokenizersDecoder(self._tokenizer)


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object. Empty if there is no such file. Raises `ConfigError` if the file is broken."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return value


def _tokenizer(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"there is no tokenizer.json in {directory}; copy it from the checkpoint that was exported")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by the names that a chat template may use, such as `eos_token`."""
    contents = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and value is not None
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _template_source(directory: Path, config: dict[str, Any]) -> str:
    """The chat template, empty if there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template") or ""
    if isinstance(source, list):  # several named templates
        source = next((one["template"] for one in source if one.get("name") == "default"), "")
    return str(source)
