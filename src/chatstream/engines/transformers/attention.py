"""Attention for one row of tokens of many sequences, each over its own slot of a `SlotCache`.

Registered with `transformers` as an attention implementation (`AttentionInterface`). A model with an exchangeable
attention (`_supports_attention_backend`, the library's flag for vLLM and TGI) runs all its other layers once over the
whole row: the newest token of each generating sequence and the prompt tokens of new ones in one forward pass.

Query heads that share keys are laid out as further queries of one head. The library instead repeats the keys for each
query head, which copies the whole memory in every layer: at 8 sequences of 256 tokens of a Qwen2 0.5B in bfloat16 on
two cores, 3.5 ms a layer instead of 0.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from chatstream.engines.transformers.kv_cache import Run, SlotCache

NAME = "chatstream_slots"

_cache: ContextVar[SlotCache | None] = ContextVar("chatstream_slots", default=None)


@contextmanager
def attention_over(cache: SlotCache, model: PreTrainedModel) -> Iterator[None]:
    """Make the model attend over the slots of this cache, in this context only.

    Afterwards the model has its own attention again: the caller that loaded it may use it between steps.
    """
    config: Any = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    token = _cache.set(cache)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _cache.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer. `transformers` calls it; key and value come from `SlotLayer.update`.

    query: (1, heads, T, head_dim); key, value: (slots, kv_heads, kv_len, head_dim). Returns (1, T, heads, head_dim).
    `sliding_window`: the layer's window in tokens, passed by the layer (Moshi's layers do not pass it: they read whole
    prompts without a window). `softcap` bounds the scores (Gemma 2); `s_aux` (heads,) is an additional score, an
    attention sink (gpt-oss). Raises `ValueError` for a layer that does not pass its window, and `RuntimeError` outside
    `attention_over`, such as in a thread other than the engine's.
    """
    cache = _cache.get()
    if cache is None:
        raise RuntimeError("an engine is computing with this model: use the model between steps, or use a copy")
    if sliding_window not in cache.windows:
        raise ValueError("its layers do not pass their sliding window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    sinks = None if s_aux is None else s_aux.reshape(1, num_kv_heads, num_heads // num_kv_heads, 1)
    output = query.new_empty((query.shape[2], num_heads, value.shape[3]))
    for run in cache.placement.runs:
        num_tokens = run.num_slots * run.num_tokens
        row = slice(run.first_token, run.first_token + num_tokens)
        output[row] = _attend_run(query[0, :, row], key, value, run, sliding_window, scale, softcap, sinks)
    return output[None], None


def _attend_run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    run: Run,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query: (heads, num_slots * num_tokens, head_dim). Returns (num_slots * num_tokens, heads, head_dim)."""
    num_slots, num_kv_heads = run.num_slots, key.shape[1]
    group = query.shape[0] // num_kv_heads
    slots, visible = slice(run.first_slot, run.first_slot + num_slots), slice(run.first_key(window), run.kv_len)
    keys, values = key[slots, :, visible], value[slots, :, visible]
    grouped = query.view(num_kv_heads, group, num_slots, run.num_tokens, -1).permute(2, 0, 1, 3, 4)
    queries = grouped.reshape(num_slots, num_kv_heads, group * run.num_tokens, -1)
    mask = run.mask(window, group, query)
    if softcap is None and sinks is None:
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    else:
        mixed = _attend_explicitly(queries, keys, values, mask, scale, softcap, sinks)
    mixed = mixed.view(num_slots, num_kv_heads, group, run.num_tokens, -1)
    return mixed.permute(0, 3, 1, 2, 4).reshape(num_slots * run.num_tokens, num_kv_heads * group, -1)


def _attend_explicitly(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with softcap and sinks, which `scaled_dot_product_attention` lacks. sinks: (1, kv_heads, group, 1)."""
    scores = queries @ keys.transpose(2, 3) * scale  # (num_slots, kv_heads, group * num_tokens, keys)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores + mask
    num_keys = scores.shape[-1]
    if sinks is not None:
        sink = sinks.expand(scores.shape[0], -1, -1, scores.shape[2] // sinks.shape[2]).reshape(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    return scores.softmax(dim=-1, dtype=torch.float32)[..., :num_keys].to(values.dtype) @ values


AttentionInterface.register(NAME, attend)
