"""Which models are fed as a batch is found out when they are loaded, also where short texts show nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MoshiConfig, MoshiForCausalLM

from chatstream.engines.transformers.attention import attention_over
from chatstream.engines.transformers.forward import choose_forward
from chatstream.engines.transformers.kv_cache import SlotCache
from chatstream.engines.transformers.memory import SequenceBytes
from tests.engines.transformers.checkpoints import CONTEXT_LEN, SLIDING_WINDOW

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
    assert not choice.forward._cache.is_complete  # type: ignore[attr-defined]
    assert choice.sequence_bytes == SequenceBytes(per_token=2 * 2 * 16 * 4)


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
