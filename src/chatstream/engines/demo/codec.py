"""Text to tokens and back for the demo model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from chatstream.engines.text.chat_template import ChatTemplate, ForgeryGuard
from chatstream.engines.text.detokenizer import Decoder, TokenizersDecoder, TokenTexts
from chatstream.types import Message


class DemoCodec:
    """A `Codec` (engines/text/codec.py) over the tokenizer files of a checkpoint directory."""

    def __init__(self, folder: Path) -> None:
        """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        bos_token, eos_token = config["bos_token"], config["eos_token"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added_tokens = self._tokenizer.get_added_tokens_decoder().values()
        self._guard = ForgeryGuard([token.content for token in added_tokens if token.special])
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._template = ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)
        self._token_texts = TokenTexts(partial(self._tokenizer.decode, skip_special_tokens=False))
        eos_token_id = self._tokenizer.token_to_id(eos_token)
        assert eos_token_id is not None
        self.eos_token_ids = frozenset({eos_token_id})

    def encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        rendered = self._template.render(self._guard.guard(messages))
        pieces = self._guard.pieces(rendered)
        return [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False).ids]

    def open_decoder(self) -> Decoder:
        return TokenizersDecoder(self._tokenizer)

    def token_text(self, token_id: int) -> str:
        return self._token_texts.of(token_id)
