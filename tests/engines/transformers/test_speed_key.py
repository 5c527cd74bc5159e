"""Models with equal speed keys are equally fast: the key depends on shapes and dtype, not on weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from chatstream.engines.transformers.speed_key import speed_key


def model(seed: int = 0, *, layers: int = 1, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
    )
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made


def test_models_with_other_weights_have_the_same_key() -> None:
    assert speed_key(model(0)) == speed_key(model(1))


def test_models_of_another_shape_dtype_or_structure_have_other_keys() -> None:
    arranged = model()
    arranged.lm_head = torch.nn.Sequential(arranged.lm_head)
    keys = {speed_key(one) for one in (model(), model(layers=2), model(dtype=torch.bfloat16), arranged)}
    assert len(keys) == 4


def test_the_key_contains_versions_and_device() -> None:
    key = speed_key(model())
    assert f"torch {torch.__version__}" in key
    assert " on cpu, " in key
