#!/usr/bin/env python
"""List which language models of the installed transformers are served as a batch, one by one, or not at all.

    python scripts/which_models.py                 all families, as the table of docs/models.md
    python scripts/which_models.py llama gemma3    only these families

Each family is built with a tiny config, in float32, with random weights, and tried as an engine does when it loads a
model. Then five requests, started one step after the other, must get the tokens that `model.generate` gives each alone.
Random weights show that the arithmetic is the same; they show nothing about a checkpoint.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.forward import Forward, choose_forward
from chatstream.errors import ConfigError

CONTEXT_LEN = 96
VOCAB_SIZE = 256
NUM_LAYERS = 4  # equals num_hidden_layers in _SIZES
NUM_NEW_TOKENS = 24
MAX_PARAMETERS = 30_000_000
_SIZES: dict[int | float, str] = {
    # Windows and chunks are shorter than prompts and answers.
    8: "sliding_window attention_window_size window_size attention_chunk_size head_dim attention_head_dim "
    "global_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim "
    "n_mamba_heads mamba_headdim",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size qk_head_dim",
    32: "hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim lru_width attention_hidden_size",
    64: "intermediate_size ffn_dim ffn_hidden_size n_inner dff",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "state_size mamba_d_state ssm_state_size mamba_dt_rank linear_num_value_heads rotary_dim "
    "encoder_attention_heads decoder_attention_heads num_hidden_layers num_layers n_layer n_layers",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads num_kv_shared_layers",
    1: "n_groups mamba_n_groups n_group topk_group first_k_dense_replace",
    12: "v_head_dim",
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input",
    CONTEXT_LEN: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    0.3: "initializer_range init_std",
    0: "bos_token_id eos_token_id pad_token_id",
}
PROMPTS = [[4 + 7 * length * n % 251 for n in range(1, length + 1)] for length in (1, 9, 30, 14, 3)]
SIZES = {name: value for value, names in _SIZES.items() for name in names.split()}
"""Value by setting, for each setting that a config has."""
EXTRA_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlnet": {"d_head": 8},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2}
    | {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": None},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    | {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""Further settings by family, without which its sizes are inconsistent."""


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("chatstream").setLevel(logging.CRITICAL)
    families: dict[tuple[str, str], list[str]] = {}
    for family in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if verdict := verdict_on(family):
            families.setdefault(verdict, []).append(family)
            print(family, *verdict, sep=" | ", file=sys.stderr)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| served | because | families |\n| --- | --- | --- |")
    for (how, why), names in sorted(families.items()):
        print(f"| {how} | {why} | {', '.join(f'`{name}`' for name in names)} |")


def verdict_on(family: str) -> tuple[str, str] | None:
    """How the family is served, and why. None: it is not a decoder-only model."""
    try:
        default = AutoConfig.for_model(family)
        if default.is_encoder_decoder or not getattr(default, "is_decoder", True):
            return None
        model = build(family, default)
        expected = [generate_alone(model, prompt) for prompt in PROMPTS]
    except Exception as error:
        print(family, *str(error).split(), file=sys.stderr)
        return "unknown", "the tiny model could not be built, or does not generate"
    with torch.inference_mode():
        try:
            choice = choose_forward(model, CONTEXT_LEN)
        except ConfigError as error:
            return "refused", error.message.partition(type(model).__name__)[2].strip()
        if generate_together(choice.forward, PROMPTS) != expected:
            return "not as `generate`", choice.slow_because
    return ("as a batch" if choice.forward.is_batched else "one by one"), choice.slow_because


def build(family: str, default: Any) -> PreTrainedModel:
    settings = tiny(default.to_dict()) | EXTRA_SETTINGS.get(family, {})
    settings.pop("model_type", None)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(type(default).from_dict(settings)).float().eval()
    if (num_parameters := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters:,} parameters, at most {MAX_PARAMETERS:,}")
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.05:  # small weights would give constant text
            parameter.data.normal_(0, 0.2)
    model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=0)
    built: PreTrainedModel = model
    return built


def tiny(settings: dict[str, Any]) -> dict[str, Any]:
    small = dict(settings)
    for name, value in settings.items():
        if isinstance(value, dict) and "rope" not in name:
            small[name] = tiny(value)
        elif name == "layer_types" and value:
            small[name] = (list(dict.fromkeys(value)) * NUM_LAYERS)[:NUM_LAYERS]  # all kinds, in rotation
        elif isinstance(value, list) and len(value) > 2 * NUM_LAYERS:
            small[name] = value[:NUM_LAYERS]
        elif name in SIZES and not isinstance(value, list | dict) and not (name.endswith("_rank") and value is None):
            small[name] = SIZES[name]
    if "per_layer_config" in small:
        small["per_layer_config"] = None
    if settings.get("kv_lora_rank") or settings.get("num_kv_shared_layers"):
        small["num_key_value_heads"] = SIZES["num_attention_heads"]
    return small


def generate_together(forward: Forward, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Generate the answers to all prompts; one more request starts in each step."""
    texts = [list(prompt) for prompt in prompts]
    num_computed = [0] * len(prompts)
    for num_steps in range(1, NUM_NEW_TOKENS + len(prompts)):
        running = [n for n in range(min(num_steps, len(texts))) if len(texts[n]) < len(prompts[n]) + NUM_NEW_TOKENS]
        inputs = [SlotInput(n, num_computed[n], tuple(texts[n][num_computed[n] :]), is_last=True) for n in running]
        groups = [inputs] if forward.is_batched else [[item] for item in inputs]
        tokens = torch.cat([forward.logits_after(group) for group in groups]).argmax(dim=-1).tolist()
        for n, token in zip(running, tokens, strict=True):
            num_computed[n] = len(texts[n])
            texts[n].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def generate_alone(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW_TOKENS, use_cache=True)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


if __name__ == "__main__":
    main()
