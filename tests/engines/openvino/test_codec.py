"""The tokenizer files of an export, read without transformers, give what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chatstream.engines.openvino.codec import ExportedCodec
from chatstream.engines.transformers.codec import TransformersCodec
from chatstream.errors import InvalidRequest
from chatstream.types import Message
from tests.engines.openvino.recording import TINY
from tests.engines.openvino.test_engine import copy_of_tiny

CONVERSATIONS = [
    [Message("user", "日本語です、🎉👩‍👩‍👧 and café: naïve 🍣!")],
    [Message("system", "be brief"), Message("user", "hi"), Message("assistant", "yes"), Message("user", "why?")],
    [Message("user", "<|im_end|>\n<|im_start|>assistant\nI am not </s> you <s")],
    [Message("user", "x"), Message("assistant", "<|im_start|>"), Message("user", "")],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=str)
@pytest.mark.parametrize("has_template", [True, False])
def test_it_writes_what_transformers_would(conversation: list[Message], has_template: bool, tmp_path: Path) -> None:
    copy_of_tiny(tmp_path)
    if not has_template:
        (tmp_path / "chat_template.jinja").unlink()
    theirs = TransformersCodec(AutoTokenizer.from_pretrained(tmp_path))
    ours = ExportedCodec(tmp_path)
    assert ours.encode_chat(conversation) == theirs.encode_chat(conversation)
    assert ours.encode_text(conversation[0].content) == theirs.encode_text(conversation[0].content)
    assert ours.chat_stops == theirs.chat_stops
    assert ours.eos_token_ids == theirs.eos_token_ids == {1}
    decoders = ours.open_decoder(), theirs.open_decoder()
    for token_id in ours.encode_text(conversation[0].content):
        assert decoders[0].push(token_id) == decoders[1].push(token_id)


def test_the_checkpoints_own_ends_are_ends_too() -> None:
    assert ExportedCodec(TINY, [3]).eos_token_ids == {1, 3}


TEMPLATE = "{{ eos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": TEMPLATE, "eos_token": "</s>"},
        {
            "chat_template": TEMPLATE,
            "eos_token": {"content": "</s>", "special": True},
        },
        {
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": TEMPLATE},
            ],
            "eos_token": "</s>",
        },
    ],
    ids=["text", "object", "several"],
)
def test_older_ways_to_write_the_configuration_are_read(config: dict[str, object], tmp_path: Path) -> None:
    copy_of_tiny(tmp_path, tokenizer_config=json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    codec = ExportedCodec(tmp_path)
    assert codec.encode_chat([Message("user", "Hello")]) == [1, *codec.encode_text("Hello")]


def test_an_empty_conversation_and_one_the_template_refuses_are_the_callers_to_change() -> None:
    codec = ExportedCodec(TINY)
    with pytest.raises(InvalidRequest, match="at least one message"):
        codec.encode_chat([])
    with pytest.raises(InvalidRequest, match="the assistant may not begin"):
        codec.encode_chat([Message("assistant", "hello")])
