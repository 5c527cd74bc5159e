"""Makes checkpoints with random weights in the shapes of real models, and their exports.

Speed does not depend on the values of the weights. No checkpoint has an end token, so every answer has the requested
length. The text of every token is complete ASCII, so over HTTP each token is its own piece of text.
"""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONTEXT_LEN = 2048
PROMPT_TOKENS = 64
"""Mean length of the prompts of simultaneous requests."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
FIRST_WORD_ID = 200
"""The first token id of word pieces; special tokens and single bytes have smaller ids."""

QWEN3_25M = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1024}
QWEN3_120M = {"hidden_size": 768, "num_hidden_layers": 14, "num_attention_heads": 12, "intermediate_size": 2304}
QWEN2_500M = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "25m": ("qwen3", QWEN3_25M | {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000}),
    "0.12b": ("qwen3", QWEN3_120M | {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000}),
    "0.5b": ("qwen2", QWEN2_500M | {"num_key_value_heads": 2, "vocab_size": 151_936}),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    name: str
    path: Path
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    num_parameters: int
    hidden_size: int
    vocab_size: int


def make_checkpoint(size: str, dtype: str, folder: Path) -> Checkpoint:
    """Return a checkpoint of a size in `SHAPES` as bfloat16 or float32; make it if it does not exist."""
    path = folder / f"{size}-{dtype}"
    kind, shape = SHAPES[size]
    if not (path / "tokenizer.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, **shape, max_position_embeddings=CONTEXT_LEN, tie_word_embeddings=True, eos_token_id=None
        )
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(path)
        _train_tokenizer(shape["vocab_size"], path)
    weight_bytes = os.path.getsize(path / "model.safetensors")
    item_bytes = {"bfloat16": 2, "float32": 4}[dtype]
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return Checkpoint(
        name=path.name,
        path=path,
        dtype=dtype,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * item_bytes,
        num_parameters=weight_bytes // item_bytes,
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
    )


def make_prompts(num_streams: int, *, seed: int, vocab_size: int) -> list[list[int]]:
    """Return random prompts with lengths within 25 % of the mean; no two prompts share a prefix, across rounds too."""
    rng = random.Random(f"{seed} {num_streams}")
    lengths = [rng.randint(PROMPT_TOKENS * 3 // 4, PROMPT_TOKENS * 5 // 4) for _ in range(num_streams)]
    return [[rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(length)] for length in lengths]


def exported_to_openvino(checkpoint: Checkpoint, weight_format: str | None, optimum_cli: str | None) -> Path:
    """Return the directory of the export; make it if it does not exist.

    `weight_format` is that of the converter; None keeps the weights. Raises `RuntimeError` with the reason on failure.
    """
    if find_spec("openvino_genai") is None:
        raise RuntimeError("openvino-genai is not installed")
    directory = checkpoint.path.with_name("-".join(filter(None, [checkpoint.path.name, "openvino", weight_format])))
    if not (directory / "openvino_model.bin").exists():
        if optimum_cli is None:
            raise RuntimeError("there is no export; see --optimum-cli")
        kind = (
            weight_format or {"bfloat16": "fp16", "float32": "fp32"}[checkpoint.dtype]
        )  # fp16: bfloat16 is exported in this format
        task = ["--task", "text-generation-with-past", "--weight-format", kind, "--disable-convert-tokenizer"]
        command = [optimum_cli, "export", "openvino", "--model", str(checkpoint.path), *task, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the export to OpenVINO failed: {done.stderr[-500:]}")
    return directory


def _train_tokenizer(vocab_size: int, path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(2 * vocab_size)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        # ASCII only: a single other byte is not complete text.
        initial_alphabet=[letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()] + ["Ġ", "Ċ"],
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(words[n : n + 100]) for n in range(0, len(words), 100)), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise RuntimeError(f"the tokenizer has {backend.get_vocab_size()} tokens, not {vocab_size}")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TEMPLATE, model_max_length=CONTEXT_LEN
    ).save_pretrained(path)
