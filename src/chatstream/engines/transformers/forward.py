"""Feeding tokens to a Hugging Face model: all generations in one pass, or one after the other.

`choose_forward` decides once, when the model is loaded. Models whose layers all keep plain keys and values (Llama,
Qwen, Mistral, Gemma 2 and 3, GPT-2, GPT-NeoX and most others) are batched over slots. Those that carry a state of
another kind, or in which rows of a batch influence each other, keep a cache of their own per request.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chatstream.engines.transformers.kv_cache import Placement, SlotCache
from chatstream.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Feed:
    """The next tokens of one slot."""

    slot: int
    start: int
    """Position of the first token; equals the number of tokens the slot already holds."""
    token_ids: tuple[int, ...]


class Forward(Protocol):
    """A model together with the memory of its running generations."""

    is_batched: bool
    """Several feeds a pass, and prompts in chunks. Otherwise: one feed a pass, and prompts whole."""

    def feed(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Logits after the last token of each feed: (len(feeds), vocab_size), the model's dtype and device.

        All feeds of one pass bring the same number of tokens.
        """

    def clear(self, slot: int, length: int) -> None:
        """The slot, which was fed `length` tokens, is empty from now on."""


def choose_forward(model: PreTrainedModel, max_len: int) -> Forward:
    """The fast way where it is right, the general one elsewhere. Runs the model on a few tokens to find out.

    Raises `ConfigError` when the model cannot be fed token by token at all.
    """
    alone = SingleForward(model)
    tokens = _probe_tokens(model)
    try:
        expected = _probe_logits(alone, tokens)
        without_prompt = alone.feed([Feed(0, 0, tokens[5:6])])[0]
        alone.clear(0, 1)
    except Exception as error:
        raise ConfigError(f"{type(model).__name__} cannot generate here: {first_line(error)}") from error
    if torch.equal(without_prompt, expected[1]):
        raise ConfigError(f"{type(model).__name__} keeps its memory of the text in a form this engine cannot hold")
    reason = _why_not_batched(model)
    if reason is None:
        batched = SlotForward(model, max_len)
        reason = _why_batched_differs(batched, tokens, expected)
        if reason is None:
            return batched
    logger.warning("%s is served one request after the other, not as a batch: %s", type(model).__name__, reason)
    return alone


def embedding_size(model: PreTrainedModel) -> int:
    """How many token ids the model can be fed."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def first_line(error: BaseException) -> str:
    """What happened, short enough for one line of a log or a terminal."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


class SlotForward:
    """One pass over any number of slots, each at its own position."""

    is_batched = True

    def __init__(self, model: PreTrainedModel, max_len: int) -> None:
        self._model = model
        self._extra = _extra_arguments(model)
        config = model.config.get_text_config(decoder=True)
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        layer_types = getattr(config, "layer_types", None)
        # The form `generate` itself prepares for fixed-size caches (masking_utils.create_masks_for_generate): a mask
        # for each type of layer where the config names them, else one for all.
        self._windows: dict[str, int | None] = dict(zip(layer_types, windows, strict=True)) if layer_types else {}
        self._window: int | None = windows[0]
        self._uses_additive_masks = config._attn_implementation == "eager"
        self._cache = SlotCache(len(windows), max_len, model.device)

    def feed(self, feeds: Sequence[Feed]) -> torch.Tensor:
        placement = self._cache.place([f.slot for f in feeds], [f.start for f in feeds], len(feeds[0].token_ids))
        output = self._model(
            input_ids=torch.tensor([f.token_ids for f in feeds], device=self._model.device),  # (B, Q)
            attention_mask=self._masks(placement),
            position_ids=placement.positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._extra,
        )
        return _last(output.logits)

    def clear(self, slot: int, length: int) -> None:
        self._cache.clear(slot, length)

    def _masks(self, placement: Placement) -> torch.Tensor | dict[str, torch.Tensor]:
        if not self._windows:
            return self._mask(placement, self._window)
        return {name: self._mask(placement, window) for name, window in self._windows.items()}

    def _mask(self, placement: Placement, window: int | None) -> torch.Tensor:
        """(B, 1, Q, kv_len): which keys each token sees; bool, or for eager attention what is added to the scores."""
        query = placement.positions[:, None, :, None]  # (B, 1, Q, 1)
        key = torch.arange(placement.kv_len, device=query.device)  # (kv_len,)
        is_seen = key <= query
        if window is not None:
            is_seen &= key > query - window
        if not self._uses_additive_masks:
            return is_seen
        dtype = self._model.dtype
        return torch.zeros(is_seen.shape, dtype=dtype, device=query.device).masked_fill_(
            ~is_seen, torch.finfo(dtype).min
        )


class SingleForward:
    """One request a pass with the cache the library itself would use: right for every model `generate` can run."""

    is_batched = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._extra = _extra_arguments(model)
        # Mamba and its kin call the same object by another name.
        is_recurrent = "cache_params" in inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if is_recurrent else "past_key_values"
        self._caches: dict[int, DynamicCache] = {}

    def feed(self, feeds: Sequence[Feed]) -> torch.Tensor:
        (feed,) = feeds
        cache = self._caches.get(feed.slot)
        if cache is None:
            cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
            self._caches[feed.slot] = cache
        output = self._model(
            input_ids=torch.tensor([feed.token_ids], device=self._model.device),
            use_cache=True,
            **{self._cache_name: cache},
            **self._extra,
        )
        return _last(output.logits)

    def clear(self, slot: int, length: int) -> None:
        self._caches.pop(slot, None)


def _extra_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Only the last token's logits are wanted: over a long prompt all of them would be the largest tensor there is."""
    has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"return_dict": True} | ({"logits_to_keep": 1} if has_logits_to_keep else {})


def _last(logits: torch.Tensor) -> torch.Tensor:
    """(B, Q or 1, vocab_size) -> (B, vocab_size)"""
    return logits[:, -1]


# --- which models may be batched over slots -----------------------------------------------------------------------


def _why_not_batched(model: PreTrainedModel) -> str | None:
    """What the model says of itself that rules slots out; None: nothing does."""
    config = model.config.get_text_config(decoder=True)
    # The library's own sign that a model takes fixed-size caches and ready-made 4-D masks.
    if not model._can_compile_fullgraph or model._is_stateful:
        return "its memory is not plain keys and values"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}, which takes no mask of ours"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "its layers keep states other than keys and values"
    known = {"full_attention", "sliding_attention"}
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) is not None or not known.issuperset(layer_types or ()):
        return "it attends in chunks"
    if {"dynamic", "longrope"} & _rope_types(config):
        return "its rotary frequencies follow the longest row of a batch, so rows would change each other"
    return None


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding, whether given once or by layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(p.get("rope_type", "default")) for p in [parameters, *nested]}


def _probe_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """A dozen different ids, spread over the vocabulary."""
    vocab_size = embedding_size(model)
    return tuple((7 + n * 7919) % vocab_size for n in range(12))


def _probe_logits(alone: SingleForward, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """What two requests of different length give alone: prompts of 8 and 5 tokens, then one token each."""
    logits = []
    for slot, num_prompt in ((0, 8), (1, 5)):
        alone.feed([Feed(slot, 0, tokens[:num_prompt])])
        logits.append(alone.feed([Feed(slot, num_prompt, tokens[num_prompt : num_prompt + 1])])[0])
        alone.clear(slot, num_prompt + 1)
    return logits


def _why_batched_differs(batched: SlotForward, tokens: tuple[int, ...], expected: Sequence[torch.Tensor]) -> str | None:
    """Run the same two requests in slots, one of the prompts in chunks, their last tokens in one pass."""
    try:
        batched.feed([Feed(1, 0, tokens[:5])])
        batched.feed([Feed(0, 0, tokens[:3])])
        batched.feed([Feed(0, 3, tokens[3:8])])
        logits = batched.feed([Feed(0, 8, tokens[8:9]), Feed(1, 5, tokens[5:6])])
    except Exception as error:
        return f"its code does not take a batch over slots ({first_line(error)})"
    finally:
        batched.clear(0, 9)
        batched.clear(1, 6)
    # Only rounding may differ. Half precision rounds coarsely, and a mixture of experts may even take another expert
    # because of it; a wrong mask or position gives errors of the order of 1.
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.2
    for row, alone in zip(logits.float(), expected, strict=True):
        if not (row - alone.float()).norm() <= tolerance * alone.float().norm():
            return "its answers change when it runs as a batch over slots"
    return None
