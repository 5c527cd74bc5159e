"""A trial at load detects models that cannot be batched, even if only long contexts show it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    OpenAIGPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.attention import attention_over
from chatstream.engines.transformers.forward import _copied, _tensors, choose_forward
from chatstream.engines.transformers.kv_cache import SlotCache
from chatstream.engines.transformers.memory import SequenceBytes
from chatstream.errors import ConfigError
from tests.engines.transformers.checkpoints import CONFIGS, CONTEXT_LEN, SLIDING_WINDOW

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}


@torch.inference_mode()
def test_a_model_with_a_window_in_its_cache_but_not_in_prompts_is_not_batched() -> None:
    config = MoshiConfig(**SMALL, ffn_dim=32, sliding_window=SLIDING_WINDOW, audio_vocab_size=16)
    choice = choose_forward(MoshiForCausalLM(config).eval(), CONTEXT_LEN)
    assert not choice.forward.is_batched
    assert "do not pass their sliding window" in choice.slow_because


@torch.inference_mode()
def test_a_model_that_depends_on_the_length_of_its_cache_is_detected_in_a_long_context() -> None:
    def double_in_long_contexts(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factor = 2.0 if kwargs["past_key_values"].get_seq_length() > 100 else 1.0
        return (args[0] * factor, *args[1:]), kwargs

    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval()
    assert choose_forward(model, CONTEXT_LEN).forward.is_batched
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert choose_forward(model, CONTEXT_LEN).forward.is_batched
    model.model.layers[0].register_forward_pre_hook(double_in_long_contexts, with_kwargs=True)
    choice = choose_forward(model, CONTEXT_LEN)
    assert not choice.forward.is_batched
    assert choice.slow_because == "its logits change in long contexts"
    assert choose_forward(model, 50).forward.is_batched, "in so short a context its logits are right"


@torch.inference_mode()
def test_the_trial_keeps_no_memory() -> None:
    choice = choose_forward(LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval(), CONTEXT_LEN)
    assert not choice.forward.is_complete  # type: ignore[attr-defined]
    assert choice.sequence_bytes == SequenceBytes(per_token=2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    ("kind", "sequence_bytes"),
    [
        # Two layers, each with the last 4 inputs of a convolution over 64 numbers, and a state of 4 for each number.
        ("mamba", SequenceBytes(per_token=0, fixed=2 * (64 * 4 + 64 * 4) * 4)),
        # One layer with keys and values, one with a convolution over 72 and a state of 8 heads of 8 times 4.
        ("bamba", SequenceBytes(per_token=2 * 2 * 8 * 4, fixed=(72 * 4 + 8 * 8 * 4) * 4)),
        ("bloom", SequenceBytes(per_token=2 * 2 * 32 * 4)),
    ],
)
@torch.inference_mode()
def test_the_memory_of_a_sequence_includes_state_of_any_kind(kind: str, sequence_bytes: SequenceBytes) -> None:
    """State-space models were counted with 0 bytes, so any number of them fitted and the cache evicted none."""
    choice = choose_forward(AutoModelForCausalLM.from_config(CONFIGS[kind](64)).eval(), CONTEXT_LEN)
    assert choice.sequence_bytes == sequence_bytes
    for num_tokens in (1, 7, 30):
        choice.forward.logits_after([SlotInput(0, 0, tuple(range(num_tokens)), is_last=True)])
        saved = choice.forward.save(0, num_tokens)
        assert saved.nbytes == sequence_bytes.of(num_tokens)
        choice.forward.clear(0, num_tokens)
        assert all(tensor.is_meta for tensor in _tensors(_copied(saved.cache, torch.device("meta"))))  # type: ignore[attr-defined]
        assert not any(tensor.is_meta for tensor in _tensors(saved.cache))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "config",
    [
        # Its argument for the state has another name, so it computes without one.
        RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=160),
        # Has no cache. Its logits depend on positions, which looked like a state.
        OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT_LEN),
        # Keeps its state in its layers, so each request would continue the state of the one before.
        RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=16),
    ],
    ids=lambda config: config.model_type,
)
@torch.inference_mode()
def test_a_model_that_cannot_keep_requests_apart_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="does not keep its state in a transformers cache"):
        choose_forward(AutoModelForCausalLM.from_config(config).eval(), CONTEXT_LEN)


def test_use_of_the_model_during_a_step_is_an_error_and_is_possible_afterwards() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    with ThreadPoolExecutor(1) as other_thread:
        with attention_over(SlotCache([None, None], CONTEXT_LEN, model.device), model):
            concurrent_use = other_thread.submit(model, input_ids=ids)
            with pytest.raises(RuntimeError, match="an engine is computing with this model"):
                concurrent_use.result()
        assert torch.equal(other_thread.submit(model, input_ids=ids).result().logits, before)
