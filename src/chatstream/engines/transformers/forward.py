"""Forward passes of a Hugging Face model: all sequences of a step in one pass, or one request at a time.

`choose_forward` decides once, when the model is loaded. Models with plain keys and values in all layers and an
exchangeable attention (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, Phi, OPT, gpt-oss and most others) run over
slots. Models with state of another kind, or in which rows of a batch influence each other, run with one cache for each
request.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chatstream.engines.batching.model import Saved, SlotInput
from chatstream.engines.transformers.attention import attention_over
from chatstream.engines.transformers.decode_graphs import Capture, DecodeGraphs
from chatstream.engines.transformers.kv_cache import SavedSlot, SlotCache
from chatstream.engines.transformers.memory import SequenceBytes, free_bytes
from chatstream.engines.transformers.same_logits import is_close
from chatstream.engines.transformers.transfer import on_device
from chatstream.errors import ConfigError

logger = logging.getLogger(__name__)

SHARE_FOR_PROBE = 0.05
"""Upper bound of the long context's size in `_long_context_mismatch`, as a share of the memory that is free when the
model is loaded. There are three copies of it: the random one, one in a slot and one in a separate cache."""


class Forward(Protocol):
    """A model and the memory of its running generations."""

    is_batched: bool
    """True: any number of inputs a pass, prompts in parts. False: one input a pass, prompts whole."""

    def bound_slots(self, max_slots: int) -> None:
        """Set the maximum number of slots. Optional; call it before the first slot is used."""

    def logits_after(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Compute the inputs and write them to their slots.

        Returns the logits after the last token of each: (len(inputs), vocab_size), in the model's dtype, on its device.
        """

    def clear(self, slot: int, length: int) -> None:
        """Empty the slot, which holds `length` tokens."""

    def save(self, slot: int, length: int) -> Saved:
        """Copy the slot, which holds `length` tokens."""

    def load(self, slot: int, saved: Any, length: int) -> None:
        """Write the first `length` tokens of `saved` to the slot, which is empty."""

    def copy(self, source: int, slot: int, length: int) -> None:
        """Write the first `length` tokens of the slot `source` to `slot`, which is empty."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model runs."""

    forward: Forward
    sequence_bytes: SequenceBytes
    slow_because: str
    """Why it is not batched; empty if it is."""


def choose_forward(model: PreTrainedModel, max_len: int, capture: Capture | None = None) -> Choice:
    """Choose `SlotForward` if it gives the right logits, else `SingleForward`. Runs the model on a few tokens.

    `capture`: how to capture decode steps as graphs; None: do not.

    Raises `ConfigError` when the model cannot generate token by token, or cannot keep requests apart.
    """
    single = SingleForward(model)
    tokens = _probe_tokens(model)
    try:
        expected = _probe_logits(single, tokens)
        without_prompt = single.logits_after([SlotInput(0, 5, tokens[5:6], is_last=True)])[0]
        first_bytes = single.nbytes(0)
        single.logits_after([SlotInput(0, 6, tokens[6:7], is_last=True)])
        bytes_per_token = single.nbytes(0) - first_bytes
        single.clear(0, 2)
    except Exception as error:
        raise ConfigError(f"{type(model).__name__} cannot generate here: {first_line(error)}") from error
    if not all(logits.isfinite().all() for logits in expected):
        raise ConfigError(f"{type(model).__name__} computes numbers that are not finite: its weights are broken")
    not_separable = ConfigError(
        f"{type(model).__name__} does not keep its state in a transformers cache, so requests cannot be kept apart"
    )
    if torch.equal(without_prompt, expected[1]):
        raise not_separable  # it ignores the cache
    reason = _batching_obstacle(model)
    if reason is None:
        batched = SlotForward(model, max_len)
        reason = _batched_mismatch(batched, tokens, expected) or _long_context_mismatch(model, batched, tokens, max_len)
        if reason is None:
            # A new one: the memory of `batched` has grown to the length of the trial.
            return Choice(SlotForward(model, max_len, capture), SequenceBytes(batched.bytes_per_token), "")
    if not is_close(torch.stack(_probe_interleaved(single, tokens)), expected):
        raise not_separable  # its state is in the model, shared by all requests
    logger.warning("%s runs one request at a time, not as a batch: %s", type(model).__name__, reason)
    return Choice(single, SequenceBytes(bytes_per_token, first_bytes - bytes_per_token), reason)


def embedding_size(model: PreTrainedModel) -> int:
    """Number of token ids that the model accepts."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def first_line(error: BaseException) -> str:
    """The first line of the message, or the error's type; at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


class SlotForward:
    """All tokens of a step, of any number of sequences, in one row and one pass."""

    is_batched = True

    def __init__(self, model: PreTrainedModel, max_len: int, capture: Capture | None = None) -> None:
        """`capture`: how to capture decode steps as graphs; None: do not."""
        self.model = model
        config = model.config.get_text_config(decoder=True)
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        self.cache = SlotCache(windows, max_len, model.device)
        cache = self.cache
        self.clear, self.save, self.load, self.copy = cache.clear, cache.save, cache.load, cache.copy
        self.graphs = None if capture is None else DecodeGraphs(cache, self.forward_pass, self._eager, capture)

    def bound_slots(self, max_slots: int) -> None:
        self.cache.max_slots = max_slots

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    @property
    def is_complete(self) -> bool:
        return self.cache.is_complete

    def logits_after(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        if self.graphs is not None and self.is_complete and all(len(item.token_ids) == 1 for item in inputs):
            return self.graphs.logits_after(inputs)
        return self._eager(inputs)

    def _eager(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        device = self.model.device
        placement = self.cache.place(inputs)
        ends = itertools.accumulate(len(item.token_ids) for item in inputs)
        token_ids = on_device([id_ for item in inputs for id_ in item.token_ids], device)
        # Only the last token's logits of each input: those of a whole prompt would be the largest tensor of all.
        return self.forward_pass(token_ids, placement.positions, on_device([end - 1 for end in ends], device))

    def forward_pass(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute one row of tokens, for which `cache.placement` is set.

        `token_ids`, `positions`: (T,), int64. `rows`: (R,), int64, indices of tokens. Returns their logits,
        (R, vocab_size).
        """
        with attention_over(self.cache, self.model):
            output = self.model(
                input_ids=token_ids[None],  # (1, T)
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def random_kv(self, length: int) -> SavedSlot:
        """Random keys and values of `length` tokens, in the shape of a slot, for a trial.

        Values grow with the position, so attention over too few or too many positions changes the result.
        """
        generator = torch.Generator().manual_seed(0)
        growing = torch.linspace(-2, 2, length)[:, None]

        def like(memory: torch.Tensor, added: torch.Tensor | float) -> torch.Tensor:
            shape = (memory.shape[0], length, memory.shape[2])
            return (torch.rand(shape, generator=generator) * 2 - 1 + added).to(memory.dtype)

        return SavedSlot(tuple((like(k, 0.0), like(v, growing)) for k, v in self.cache.save(0, 0).layers))


@dataclass(frozen=True, slots=True)
class SavedCache:
    """The whole cache of one request, in host memory."""

    cache: DynamicCache

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.cache))


class SingleForward:
    """One request a pass, with the library's own cache: right for every model that `generate` can run."""

    is_batched = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        # Mamba and related models have another name for this argument.
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._caches: dict[int, DynamicCache] = {}
        self._partial_prompts: dict[int, tuple[int, ...]] = {}
        """Prompt tokens not computed yet, by slot. A model of unknown kind may not be able to continue a prompt, so it
        computes prompts whole."""

    def bound_slots(self, max_slots: int) -> None:
        pass

    def logits_after(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        (item,) = inputs
        token_ids = self._partial_prompts.pop(item.slot, ()) + item.token_ids
        if not item.is_last:
            self._partial_prompts[item.slot] = token_ids
            return torch.empty((1, 0))
        cache = self._caches.get(item.slot)
        if cache is None:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            self._caches[item.slot] = cache
        arguments: dict[str, Any] = {self._cache_name: cache, **self._extra}
        if self._takes_positions:
            # As `generate` does: without them, some models (Bamba) count positions wrongly.
            end = item.start + len(item.token_ids)
            arguments["position_ids"] = torch.arange(end - len(token_ids), end, device=self.model.device)[None]
        output = self.model(
            input_ids=on_device([token_ids], self.model.device),
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def clear(self, slot: int, length: int) -> None:
        self._caches.pop(slot, None)
        self._partial_prompts.pop(slot, None)

    def save(self, slot: int, length: int) -> SavedCache:
        return SavedCache(_copied(self._caches[slot], torch.device("cpu")))

    def load(self, slot: int, saved: SavedCache, length: int) -> None:
        self._caches[slot] = _copied(saved.cache, self.model.device)

    def copy(self, source: int, slot: int, length: int) -> None:
        raise NotImplementedError("a state of unknown kind cannot be copied in part")

    def nbytes(self, slot: int) -> int:
        return SavedCache(self._caches[slot]).nbytes


def _copied(cache: DynamicCache, device: torch.device) -> DynamicCache:
    return copy.deepcopy(cache, {id(tensor): tensor.to(device, copy=True) for tensor in _tensors(cache)})


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """All tensors of a cache: layers keep them in attributes, lists, dictionaries and objects."""
    tensors, visited = [], set()
    stack: list[Any] = [cache]
    while stack:
        value = stack.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            stack += vars(value).values()
    return tensors


# --- which models can run over slots ------------------------------------------------------------------------------


def _batching_obstacle(model: PreTrainedModel) -> str | None:
    """Why the model's class or config rules out slots; None if neither does."""
    config = model.config.get_text_config(decoder=True)
    if not model._supports_attention_backend or model._is_stateful:
        return "its attention cannot be exchanged"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it computes the logits of all tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"it was loaded with the attention {config._attn_implementation}"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "its layers keep states other than keys and values"
    known = {"full_attention", "sliding_attention"}
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) is not None or not known.issuperset(layer_types or ()):
        return "it attends in chunks"
    if {"dynamic", "longrope"} & _rope_types(config):
        return "its rotary frequencies depend on the longest sequence of a pass"
    return None


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding, for all layers or by layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(p.get("rope_type", "default")) for p in [parameters, *nested]}


_PROBED = ((0, 8), (1, 5))
"""Slots, and the lengths of their prompts in tokens."""


def _probe_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Twelve ids, spread over the vocabulary."""
    vocab_size = embedding_size(model)
    return tuple((7 + n * 7919) % vocab_size for n in range(12))


def _probe_logits(single: SingleForward, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of two requests, one after the other: a prompt, then one token each. Two of (vocab_size,)."""
    logits = []
    for slot, num_prompt in _PROBED:
        single.logits_after([SlotInput(slot, 0, tokens[:num_prompt], is_last=True)])
        logits.append(
            single.logits_after([SlotInput(slot, num_prompt, tokens[num_prompt : num_prompt + 1], is_last=True)])[0]
        )
        single.clear(slot, num_prompt + 1)
    return logits


def _probe_interleaved(single: SingleForward, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of the same two requests, interleaved: both prompts, then one token each."""
    for slot, num_prompt in _PROBED:
        single.logits_after([SlotInput(slot, 0, tokens[:num_prompt], is_last=True)])
    logits = [single.logits_after([SlotInput(slot, n, tokens[n : n + 1], is_last=True)])[0] for slot, n in _PROBED]
    for slot, num_prompt in _PROBED:
        single.clear(slot, num_prompt + 1)
    return logits


def _batched_mismatch(batched: SlotForward, tokens: tuple[int, ...], expected: Sequence[torch.Tensor]) -> str | None:
    """Run the same two requests in shared passes, with prompts in parts. Returns why the logits are not `expected`."""
    try:
        batched.logits_after([SlotInput(1, 0, tokens[:4], is_last=False), SlotInput(0, 0, tokens[:3], is_last=False)])
        batched.logits_after([SlotInput(1, 4, tokens[4:5], is_last=True), SlotInput(0, 3, tokens[3:8], is_last=True)])
        logits = batched.logits_after(
            [SlotInput(0, 8, tokens[8:9], is_last=True), SlotInput(1, 5, tokens[5:6], is_last=True)]
        )
    except Exception as error:
        return f"its code does not accept a row of tokens of several sequences ({first_line(error)})"
    finally:
        batched.clear(0, 9)
        batched.clear(1, 6)
    if not batched.is_complete:
        return "some of its layers do not use the cache"
    return None if is_close(logits, expected) else "its logits change when several sequences share a pass"


def _long_context_mismatch(
    model: PreTrainedModel, batched: SlotForward, tokens: tuple[int, ...], max_len: int
) -> str | None:
    """Compare one token after a long context, where windows exclude tokens and position effects are largest.

    The context is random keys and values: to compute real ones takes as long as a prompt of that length. Returns why
    the logits of slots and of a plain cache differ; None if they agree.
    """
    length = min(max_len - 1, int(free_bytes(model.device) * SHARE_FOR_PROBE) // batched.bytes_per_token)
    if length < len(tokens):
        return None  # `_batched_mismatch` has covered these lengths
    saved = batched.random_kv(length)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    single = SingleForward(model)
    item = SlotInput(0, length, tokens[:1], is_last=True)
    try:
        for index, (keys, values) in enumerate(saved.layers):
            cache.update(keys[None].to(model.device), values[None].to(model.device), index)
        single.load(0, SavedCache(cache), length)
        expected = single.logits_after([item])
        batched.load(0, saved, length)
        logits = batched.logits_after([item])
    except Exception as error:
        return f"its code does not continue a long context ({first_line(error)})"
    return None if is_close(logits, expected) else "its logits change in long contexts"
