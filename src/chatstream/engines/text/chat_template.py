"""Chat templates, without transformers: render a conversation as the text that a model was trained to continue.

Knows no tokenizer and no engine. A template is a program by the author of the model, so it runs in Jinja's sandbox. The
text of a message is data, so `ForgeryGuard` prevents it from being read as special tokens of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import Message

PLAIN_CHAT_STOPS = ("\nUser:",)
"""Stop strings for a model without a chat template: the start of a user message that it makes up."""
_PLAIN_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class ChatTemplate:
    """A chat template in the format of `transformers`; renders the same text as its `apply_chat_template`."""

    def __init__(self, source: str, **special_tokens: str) -> None:
        """`special_tokens` are variables of the template: `bos_token="<s>"`, `eos_token="</s>"` and the like.

        Raises `ConfigError` when the source is not a valid template.
        """
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is broken in line {error.lineno}: {error.message}") from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, with the beginning of an assistant message if `add_generation_prompt`.

        Raises `InvalidRequest` when the template raises an error for this conversation.
        """
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


class ForgeryGuard:
    """Prevents the text of a message from being tokenised as special tokens, so that it cannot forge another turn.

    In a message, the text is cut after the first character of every special token. The pieces are tokenised separately,
    and no piece contains a special token; no character is lost. Text without special tokens stays in one piece.
    """

    CUT = "\ufdd0"
    """A noncharacter, which Unicode reserves for internal use. It is removed from messages that contain it."""

    def __init__(self, special_tokens: Collection[str], added_tokens: Collection[str] = (), template: str = "") -> None:
        """An added token counts as special if the template contains it, because some checkpoints mark turns with added
        tokens. Other added tokens are ordinary text: runs of spaces, HTML, terms of a subject."""
        marks = {token for token in added_tokens if token.strip() and token in template}
        self._special = _beginning_of(special_tokens)
        self._special_or_mark = _beginning_of({*special_tokens, *marks})

    def guard(self, messages: Sequence[Message]) -> list[Message]:
        """The messages to render with the template."""
        return [replace(message, content=self._cut(message)) for message in messages]

    def pieces(self, rendered: str) -> list[str]:
        """Split the rendered text into the pieces to tokenise separately."""
        return rendered.split(self.CUT)

    def _cut(self, message: Message) -> str:
        # An answer of the model may contain marks that templates search for: some cut it at </think>.
        beginning = self._special if message.role == "assistant" else self._special_or_mark
        return beginning.sub(rf"\1{self.CUT}", message.content.replace(self.CUT, ""))


def _beginning_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches the first character of each token. A look-ahead, so that overlapping tokens are all found."""
    choices = "|".join(re.escape(token) for token in tokens if len(token) > 1) or "(?!)"
    return re.compile(f"(?=(?:{choices}))(.)", re.DOTALL)


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation as text, for a model without a chat template."""
    turns = [f"{_PLAIN_SPEAKERS[message.role]}: {message.content}\n" for message in messages]
    return "".join(turns) + "Assistant:"


def _environment() -> ImmutableSandboxedEnvironment:
    """The filters and functions that templates of Hugging Face use."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for training. It does not change the rendered text."""

    tags = {"generation"}  # noqa: RUF012 - as in the base class

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without HTML escapes, unlike Jinja's own filter of this name."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
