"""A broken checkpoint is refused with one clear line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
)

from chatstream.engines.transformers import checkpoint as checkpoint_module
from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.errors import ConfigError
from tests.engines.transformers.checkpoints import CONTEXT_LEN, TEMPLATE, train_tokenizer
from tests.engines.transformers.recording import refusal_of

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- broken checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "unknown/model"])
async def test_a_missing_checkpoint_is_refused(name: str) -> None:
    assert f"cannot load {name}: " in await refusal_of(name)


async def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "Unrecognized model" in await refusal_of(str(tmp_path))


async def test_a_config_that_is_not_json_is_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "config.json").write_text("{")
    assert "config.json cannot be read" in await refusal_of(str(path))


async def test_a_model_type_newer_than_the_library_is_refused(copy_of: Callable[..., Path]) -> None:
    assert "does not support this model type" in await refusal_of(str(copy_of(model_type="llama_of_tomorrow")))


async def test_missing_weights_are_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "model.safetensors").unlink()
    assert "no file named" in await refusal_of(str(path))


def in_shards(path: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


async def test_a_missing_shard_is_named(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    shards = in_shards(path)
    shards[1].unlink()
    assert shards[1].name in await refusal_of(str(path))


async def test_a_truncated_shard_is_named(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    shards = in_shards(path)
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    message = await refusal_of(str(path))
    assert message.startswith(f"cannot load {path}: {shards[1].name} cannot be read: ")
    assert "file not fully covered" in message


@pytest.mark.parametrize("content", [b"", b"1234", bytes(range(256)) * 40], ids=["empty", "short", "garbage"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
async def test_a_damaged_file_is_named(name: str, content: bytes, copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    if name.endswith("json") and content == b"1234":
        content = b"{"  # a number is JSON
    (path / name).write_bytes(content)
    assert f"{name} cannot be read: " in await refusal_of(str(path))


async def test_a_pickle_instead_of_weights_is_not_loaded(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": print}, protocol=2))
    assert "the file of the weights is damaged, or contains other objects than weights" in await refusal_of(str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
async def test_a_file_without_read_permission_is_named(name: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    if os.geteuid() == 0:  # root can read every file, but not a directory as a file
        (path / name).unlink()
        (path / name).mkdir()
    else:
        (path / name).chmod(0)
    assert name in await refusal_of(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 200}, "2 weights differ in size from config.json, such as lm_head.weight: (384, 32) in"),
        ({"intermediate_size": 65}, "mlp.down_proj.weight: (32, 64) instead of (32, 65)"),
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
        ({"hidden_act": "nonsense"}, "'nonsense' is missing from its files, or transformers does not support it"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ],
)
async def test_a_config_of_another_model_is_refused(
    config: dict[str, Any], message: str, copy_of: Callable[..., Path]
) -> None:
    assert message in await refusal_of(str(copy_of(**config)))


async def test_unused_weights_are_logged_in_one_line(
    copy_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    load(str(copy_of(num_hidden_layers=1)), None, LoadSettings(device="cpu"))
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.endswith("9 weights of the checkpoint are not used, such as model.layers.1.input_layernorm.weight")


async def test_missing_weights_are_not_replaced_by_random_ones(copy_of: Callable[..., Path]) -> None:
    assert "9 weights are missing, such as model.layers.2." in await refusal_of(str(copy_of(num_hidden_layers=3)))


async def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    assert "bart is an encoder-decoder" in await refusal_of(str(tmp_path))


async def test_a_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "vit is not a causal language model" in await refusal_of(str(tmp_path))


async def test_a_model_that_does_not_keep_its_state_in_a_cache_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, context_length=32)
    )
    assert "RwkvForCausalLM does not keep its state in a transformers cache" in await refusal_of(model, tokenizer)


async def test_a_tokenizer_without_files_is_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert f"cannot load the tokenizer of {path}: " in await refusal_of(str(path))


async def test_the_tokenizer_is_loaded_before_the_weights(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "tokenizer.json").unlink()
    (path / "model.safetensors").unlink()
    assert "there is no tokenizer.json, and no other file" in await refusal_of(str(path))


async def test_the_tokenizer_of_a_larger_model(copy_of: Callable[..., Path], checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    tokenizer = train_tokenizer()
    model.resize_token_embeddings(tokenizer.vocab_size - 1)
    message = await refusal_of(model, tokenizer)
    assert message == f"the tokenizer has {tokenizer.vocab_size} tokens, the model 383: they do not belong together"


def test_added_tokens_outside_the_vocabulary_are_logged(
    copy_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_of()
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<pad>", "<image>"])
    tokenizer.save_pretrained(path)
    load(str(path), None, LoadSettings(device="cpu"))
    assert "the tokenizer adds 2 tokens outside the model's vocabulary" in caplog.text


async def test_an_added_token_that_the_template_puts_into_every_conversation_is_refused(
    copy_of: Callable[..., Path],
) -> None:
    """Such a model was served, and each request failed with token ids outside the model's vocabulary."""
    path = copy_of()
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = f"<turn>{TEMPLATE}"
    tokenizer.save_pretrained(path)
    assert await refusal_of(str(path)) == (
        f"cannot serve {path}: its chat template puts '<turn>', token 384, into every conversation, "
        "and the model has 384 tokens"
    )


async def test_weights_that_are_not_finite_are_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(path)
    assert "computes numbers that are not finite" in await refusal_of(str(path))


async def test_a_broken_chat_template_is_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "chat_template.jinja").write_text("{% for message in")
    assert (await refusal_of(str(path))).startswith("the chat template is broken: ")


def test_a_chat_template_may_refuse_a_conversation(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "chat_template.jinja").write_text("{{ raise_exception('not this one') }}")
    load(str(path), None, LoadSettings(device="cpu"))


async def test_the_error_keeps_its_cause(copy_of: Callable[..., Path]) -> None:
    engine = create_engine(str(copy_of(model_type="llama_of_tomorrow")))
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert isinstance(caught.value.__cause__, ValueError)


# --- names of the model hub ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "two/levels/deep"])
async def test_a_name_that_can_only_be_a_directory_is_not_looked_up_at_the_hub(name: str) -> None:
    assert await refusal_of(name) == f"cannot load {name}: there is no such directory"


async def test_without_the_hub_the_error_lists_all_tried_locations() -> None:
    message = await refusal_of("unknown/model")
    assert message.startswith("cannot load unknown/model: there is no such directory, it is not in the cache, and http")
    assert " cannot be reached (" in message


async def test_a_hub_that_does_not_respond_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint_module, "HUB_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(checkpoint_module, "hf_hub_url", lambda name, file: f"{url}/{name}/resolve/main/{file}")
        assert f"and {url} cannot be reached (timed out)" in await refusal_of("unknown/model")


def test_without_the_hub_a_model_is_loaded_from_the_cache(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--me--tiny"
    shutil.copytree(checkpoint("llama"), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert load("me/tiny", None, LoadSettings(device="cpu")).runner.context_len == CONTEXT_LEN
    assert "cannot be reached; me/tiny is loaded from the cache" in caplog.text
