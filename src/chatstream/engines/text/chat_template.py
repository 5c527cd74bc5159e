"""A conversation to the text a model was trained to continue: chat templates, without transformers.

Knows no tokenizer and no engine. A template is a program from the model's author, so it runs in Jinja's sandbox;
what users write is data, so `ForgeryGuard` keeps it from passing for the template's own special tokens.
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
"""Where a model without a chat template begins to speak for the user."""
_PLAIN_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class ChatTemplate:
    """A chat template as `transformers` writes them, rendered as `apply_chat_template` renders it."""

    def __init__(self, source: str, **special_tokens: str) -> None:
        """`special_tokens` are those the template may name: `bos_token="<s>"`, `eos_token="</s>"` and the like.

        Raises `ConfigError` when the source is not a template.
        """
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is broken in line {error.lineno}: {error.message}") from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the answer begins.

        Raises `InvalidRequest` when the template refuses it.
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
            raise InvalidRequest(f"the model's chat template refuses this: {error}", param="messages") from error


class ForgeryGuard:
    """Keeps the text of a message from being read as special tokens, so that nobody can write somebody else's turn.

    Wherever a special token begins in a message, the text is cut after that token's first character. The pieces are
    tokenised one by one, and none of them holds a special token any more; not a character is lost. Text without
    special tokens, which is nearly all, stays in one piece and is tokenised as usual.
    """

    CUT = "\ufdd0"
    """A code point Unicode reserves for such internal marks. It is dropped from messages that contain it."""

    def __init__(self, special_tokens: Collection[str], added_tokens: Collection[str] = (), template: str = "") -> None:
        """Of the added tokens, those count as special that the template writes or looks for: some checkpoints mark
        turns with them. Those that it does not name are ordinary text: runs of spaces, HTML, words of a field."""
        marks = {token for token in added_tokens if token.strip() and token in template}
        self._special = _beginning_of(special_tokens)
        self._special_or_mark = _beginning_of({*special_tokens, *marks})

    def guard(self, messages: Sequence[Message]) -> list[Message]:
        """The messages to give to the template."""
        return [replace(message, content=self._cut(message)) for message in messages]

    def pieces(self, rendered: str) -> list[str]:
        """What the template made of them, in pieces to be tokenised one by one."""
        return rendered.split(self.CUT)

    def _cut(self, message: Message) -> str:
        # What the model says may hold marks that templates look for, such as the </think> before which they cut.
        beginning = self._special if message.role == "assistant" else self._special_or_mark
        return beginning.sub(rf"\1{self.CUT}", message.content.replace(self.CUT, ""))


def _beginning_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches the first character of each. A look-ahead, so that tokens which overlap each other are all found."""
    choices = "|".join(re.escape(token) for token in tokens if len(token) > 1) or "(?!)"
    return re.compile(f"(?=(?:{choices}))(.)", re.DOTALL)


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation for a model that has no template for one."""
    turns = [f"{_PLAIN_SPEAKERS[message.role]}: {message.content}\n" for message in messages]
    return "".join(turns) + "Assistant:"


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face's templates expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the answers for training; here it changes nothing."""

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
    """Jinja's own filter of this name escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
