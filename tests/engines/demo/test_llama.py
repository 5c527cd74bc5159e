"""The numpy network gives the same logits as transformers for the same files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatstream.engines.demo import CHECKPOINT
from chatstream.engines.demo.kv_cache import KVCache
from chatstream.engines.demo.llama import Llama, LlamaShape

SMALL = LlamaShape(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    context_len=700,
    rope_theta=100.0,
    norm_eps=1e-5,
)


def small_reference() -> Any:
    """A model with random weights, large enough that every part of the network affects the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.intermediate_size,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        max_position_embeddings=SMALL.context_len,
        rope_parameters={"rope_type": "default", "rope_theta": SMALL.rope_theta},
        rms_norm_eps=SMALL.norm_eps,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def reference_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([token_ids])).logits[0].numpy()
    return logits


def our_logits(model: Llama, sequences: list[list[int]], chunk: int, num_decoded: int) -> list[np.ndarray]:
    """Logits of all positions: all but the last `num_decoded` tokens in chunks, then one by one, with all sequences in
    one batch."""
    cache = KVCache(model.shape)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    for slot, tokens in enumerate(sequences):
        cache.open(slot)
        prompt = tokens[: len(tokens) - num_decoded]
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            cache.reserve(start + len(part))
            positions = np.arange(start, start + len(part))
            rows[slot].append(model.logits(model.hidden(part, positions, cache.prefill(slot, len(part)))))
            cache.lengths[slot] += len(part)
    slots = list(range(len(sequences)))
    for n in range(num_decoded, 0, -1):
        positions = cache.lengths[slots]
        cache.reserve(int(positions.max()) + 1)
        last = [tokens[len(tokens) - n] for tokens in sequences]
        logits = model.logits(model.hidden(last, positions, cache.decode(slots)))
        cache.lengths[slots] += 1
        for slot in slots:
            rows[slot].append(logits[slot : slot + 1])
    return [np.concatenate(parts) for parts in rows]


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_logits_are_those_of_transformers(reference: Any, chunk: int) -> None:
    random = np.random.Generator(np.random.PCG64(3))
    sequences = [random.integers(0, 2048, size=length).tolist() for length in (20, 33, 150, 400)]
    ours = our_logits(Llama.load(CHECKPOINT), sequences, chunk, num_decoded=12)
    for tokens, logits in zip(sequences, ours, strict=True):
        assert np.abs(logits - reference_logits(reference, tokens)).max() <= 1e-3


def test_random_weights_give_the_logits_of_transformers() -> None:
    model = small_reference()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    random = np.random.Generator(np.random.PCG64(4))
    sequences = [random.integers(0, SMALL.vocab_size, size=length).tolist() for length in (30, 600)]
    ours = our_logits(Llama(SMALL, tensors), sequences, chunk=100, num_decoded=20)
    for tokens, logits in zip(sequences, ours, strict=True):
        np.testing.assert_allclose(logits, reference_logits(model, tokens), atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "mistral"), ("attention_bias", True), ("head_dim", 64), ("hidden_act", "gelu")]
)
def test_a_config_with_an_unsupported_feature_is_refused(tmp_path: Path, field: str, value: object) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match="not a plain Llama"):
        LlamaShape.from_config(tmp_path / "config.json")
