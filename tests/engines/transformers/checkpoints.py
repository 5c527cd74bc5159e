"""Tiny models of several architectures and the byte-level BPE tokenizer they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Zamba2Config,
)

CONTEXT_LEN = 160
SLIDING_WINDOW = 9
"""Tokens. Far shorter than prompts and answers, so that a wrong window changes the text."""
CHUNK_LEN = 16
"""Tokens that a recurrent layer computes at once. A prompt has several chunks."""
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] or (loop.first and m.role == 'assistant') %}"
    "{{ raise_exception('the assistant may not begin') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello world, how are you today? The quick brown fox jumps over the lazy dog.",
    "system user assistant one two three four five six seven eight nine ten",
    "日本語のテキストです。絵文字も使います。今日はいい天気ですね。",
    "🎉👩‍👩‍👧🍣 éàü ñ",
]


def train_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        model_max_length=CONTEXT_LEN,
    )


def save(kind: str, directory: Path) -> Path:
    """Write a checkpoint with random weights and its tokenizer."""
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind](len(tokenizer)))
    # Two end tokens, as chat models have: one in the checkpoint's list, one of the tokenizer.
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    # Greedy: the recommended sampling is not compared.
    model.generation_config.update(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)
    model.generation_config.eos_token_id = [1, 3]
    loaded: PreTrainedModel = model.eval()
    return loaded


def _sizes(vocab_size: int, **more: Any) -> dict[str, Any]:
    """Small sizes, and weights wide enough that greedy text is neither constant nor short."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LEN,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return common | more


_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
_MIXED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda vocab: LlamaConfig(**_sizes(vocab, **_GROUPED)),
    "qwen3": lambda vocab: Qwen3Config(**_sizes(vocab, **_GROUPED)),
    "mistral": lambda vocab: MistralConfig(**_sizes(vocab, **_GROUPED, sliding_window=SLIDING_WINDOW)),
    "gpt_neox": lambda vocab: GPTNeoXConfig(**_sizes(vocab)),
    "gpt2": lambda vocab: GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT_LEN,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    ),
    # Caps its attention scores, so it has no "sdpa": masks are added to the scores.
    "gemma2": lambda vocab: Gemma2Config(**_sizes(vocab, **_GROUPED, **_MIXED)),
    "gemma3": lambda vocab: Gemma3TextConfig(**_sizes(vocab, **_GROUPED, **_MIXED)),
    "phi3": lambda vocab: Phi3Config(**_sizes(vocab, num_key_value_heads=2, sliding_window=SLIDING_WINDOW)),
    "opt": lambda vocab: OPTConfig(**_sizes(vocab, ffn_dim=64, word_embed_proj_dim=32, init_std=0.4)),
    "cohere2": lambda vocab: Cohere2Config(**_sizes(vocab, **_GROUPED, **_MIXED)),
    # One head of keys for all queries.
    "gpt_bigcode": lambda vocab: GPTBigCodeConfig(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT_LEN,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    ),
    # Experts and attention sinks.
    "gpt_oss": lambda vocab: GptOssConfig(
        **_sizes(vocab, **_GROUPED, **_MIXED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda vocab: Qwen3MoeConfig(
        **_sizes(vocab, **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    # Keys and values are projected from a latent vector, and differ in size.
    "deepseek_v3": lambda vocab: DeepseekV3Config(
        **_sizes(
            vocab,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
        )
    ),
    # Every other layer has no positions.
    "smollm3": lambda vocab: SmolLM3Config(**_sizes(vocab, num_key_value_heads=2, no_rope_layer_interval=2)),
    # Not batched over slots: positions as a bias computed from a 2-D mask, a recurrent state, rotary frequencies that
    # depend on the longest row.
    "bloom": lambda vocab: BloomConfig(
        vocab_size=vocab, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=0, eos_token_id=1
    ),
    "mamba": lambda vocab: MambaConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.4, eos_token_id=1
    ),
    "mamba2": lambda vocab: Mamba2Config(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        state_size=4,
        chunk_size=CHUNK_LEN,
        initializer_range=0.4,
        eos_token_id=1,
    ),
    # Counts positions wrongly without `position_ids`.
    "bamba": lambda vocab: BambaConfig(
        **_sizes(vocab, num_key_value_heads=2, attn_layer_indices=[1]),
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=CHUNK_LEN,
    ),
    "jamba": lambda vocab: JambaConfig(
        **_sizes(vocab, num_key_value_heads=2, num_hidden_layers=3, attn_layer_period=3, attn_layer_offset=1),
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "zamba2": lambda vocab: Zamba2Config(
        **_sizes(vocab, num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
        num_key_value_heads=4,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_d_state=4,
        chunk_size=CHUNK_LEN,
        use_mem_rope=True,
    ),
    "llama_dynamic_rope": lambda vocab: LlamaConfig(
        **_sizes(vocab, **_GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    ),
}
BATCHED = (
    *("llama", "qwen3", "mistral", "gpt_neox", "gpt2", "gemma2", "gemma3", "phi3", "opt", "cohere2", "gpt_bigcode"),
    *("gpt_oss", "qwen3_moe", "deepseek_v3", "smollm3"),
)
ONE_BY_ONE = ("bloom", "mamba", "mamba2", "bamba", "jamba", "zamba2", "llama_dynamic_rope")
