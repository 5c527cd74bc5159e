"""Which models are fed as a batch is found out when they are loaded, also where short texts show nothing."""

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
def test_a_model_that_forgets_what_is_past_a_window_but_reads_prompts_without_one_is_not_batched() -> None:
    config = MoshiConfig(**SMALL, ffn_dim=32, sliding_window=SLIDING_WINDOW, audio_vocab_size=16)
    choice = choose_forward(MoshiForCausalLM(config).eval(), CONTEXT_LEN)
    assert not choice.forward.is_batched
    assert "how far back they see" in choice.slow_because


@torch.inference_mode()
def test_a_model_that_counts_what_is_in_its_cache_is_found_out_although_only_long_texts_show_it() -> None:
    def louder_in_long_texts(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factor = 2.0 if kwargs["past_key_values"].get_seq_length() > 100 else 1.0
        return (args[0] * factor, *args[1:]), kwargs

    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval()
    assert choose_forward(model, CONTEXT_LEN).forward.is_batched
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert choose_forward(model, CONTEXT_LEN).forward.is_batched
    model.model.layers[0].register_forward_pre_hook(louder_in_long_texts, with_kwargs=True)
    choice = choose_forward(model, CONTEXT_LEN)
    assert not choice.forward.is_batched
    assert choice.slow_because == "its answers change in long texts"
    assert choose_forward(model, 50).forward.is_batched, "in contexts as short as this it is right"


@torch.inference_mode()
def test_the_trial_leaves_no_memory_behind() -> None:
    choice = choose_forward(LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval(), CONTEXT_LEN)
    assert not choice.forward.is_complete  # type: ignore[attr-defined]
    assert choice.sequence_bytes == SequenceBytes(per_token=2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    ("kind", "sequence_bytes"),
    [
        # The last 4 inputs of a convolution over 64 numbers, a state of 4 for each of those: twice.
        ("mamba", SequenceBytes(per_token=0, fixed=2 * (64 * 4 + 64 * 4) * 4)),
        # One layer with keys and values, one with a convolution over 72 and a state of 8 heads of 8 times 4.
        ("bamba", SequenceBytes(per_token=2 * 2 * 8 * 4, fixed=(72 * 4 + 8 * 8 * 4) * 4)),
        ("bloom", SequenceBytes(per_token=2 * 2 * 32 * 4)),
    ],
)
@torch.inference_mode()
def test_what_a_sequence_takes_is_counted_wherever_the_model_keeps_it(kind: str, sequence_bytes: SequenceBytes) -> None:
    """State-space models were reckoned to need nothing: any number of them fitted, and none left the pool."""
    choice = choose_forward(AutoModelForCausalLM.from_config(CONFIGS[kind](64)).eval(), CONTEXT_LEN)
    assert choice.sequence_bytes == sequence_bytes
    for num_tokens in (1, 7, 30):
        choice.forward.feed([SlotInput(0, 0, tuple(range(num_tokens)), is_last=True)])
        saved = choice.forward.save(0, num_tokens)
        assert saved.nbytes == sequence_bytes.of(num_tokens)
        choice.forward.clear(0, num_tokens)
        assert all(tensor.is_meta for tensor in _tensors(_copied(saved.cache, torch.device("meta"))))  # type: ignore[attr-defined]
        assert not any(tensor.is_meta for tensor in _tensors(saved.cache))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "config",
    [
        # Takes its state by another name, and without one it forgets.
        RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=160),
        # Keeps nothing; that it is told where in the text a token stands looked like memory.
        OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT_LEN),
        # Keeps it in its layers, where every request would go on with what the one before left.
        RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=16),
    ],
    ids=lambda config: config.model_type,
)
@torch.inference_mode()
def test_a_model_that_does_not_keep_each_request_by_itself_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="keeps its memory of the text in a form this engine cannot hold"):
        choose_forward(AutoModelForCausalLM.from_config(config).eval(), CONTEXT_LEN)


def test_whoever_uses_the_model_while_the_engine_does_is_told_and_can_use_it_afterwards() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32)).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    with ThreadPoolExecutor(1) as elsewhere:
        with attention_over(SlotCache([None, None], CONTEXT_LEN, model.device), model):
            used_meanwhile = elsewhere.submit(model, input_ids=ids)
            with pytest.raises(RuntimeError, match="for an engine at this moment"):
                used_meanwhile.result()
        assert torch.equal(elsewhere.submit(model, input_ids=ids).result().logits, before)
