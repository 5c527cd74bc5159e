"""Feeding tokens to a Hugging Face model: everybody's in one pass, or one request after the other.

`choose_forward` decides once, when the model is loaded. Models whose layers all keep plain keys and values and whose
attention may be exchanged (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, Phi, OPT, gpt-oss and most others) run over
slots. Those that carry a state of another kind, or in which rows of a batch influence each other, keep a cache of
their own per request.
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
from chatstream.engines.transformers.same_logits import is_same
from chatstream.engines.transformers.transfer import on_device
from chatstream.errors import ConfigError

logger = logging.getLogger(__name__)

SHARE_FOR_PROBE = 0.05
"""Of what is free when the model is loaded: what the long text takes at most with which it is tried out. It is there
three times: as it was made up, in a slot, and in a cache of its own."""


class Forward(Protocol):
    """A model together with the memory of its running generations."""

    is_batched: bool
    """Any number of inputs a pass, and prompts in parts. Otherwise: one input a pass, and prompts whole."""

    def bound_slots(self, max_slots: int) -> None:
        """There will never be more slots. Said before the first is used, or not at all."""

    def feed(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Logits after the last token of each input: (len(inputs), vocab_size), the model's dtype and device."""

    def clear(self, slot: int, length: int) -> None:
        """The slot, which was fed `length` tokens, is empty from now on."""

    def save(self, slot: int, length: int) -> Saved:
        """A copy of a slot that was fed `length` tokens."""

    def load(self, slot: int, saved: Any, length: int) -> None:
        """The empty slot has been fed the first `length` tokens of what was saved."""

    def copy(self, source: int, slot: int, length: int) -> None:
        """The empty slot has been fed the first `length` tokens of another one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model is fed."""

    forward: Forward
    sequence_bytes: SequenceBytes
    slow_because: str
    """Why it is not batched; empty: it is."""


def choose_forward(model: PreTrainedModel, max_len: int, capture: Capture | None = None) -> Choice:
    """The fast way where it is right, the general one elsewhere. Runs the model on a few tokens to find out.

    `capture`: how passes that repeat are recorded; None: they are not.

    Raises `ConfigError` when the model cannot be fed token by token at all.
    """
    alone = SingleForward(model)
    tokens = _probe_tokens(model)
    try:
        expected = _probe_logits(alone, tokens)
        without_prompt = alone.feed([SlotInput(0, 5, tokens[5:6], is_last=True)])[0]
        first_bytes = alone.nbytes(0)
        alone.feed([SlotInput(0, 6, tokens[6:7], is_last=True)])
        bytes_per_token = alone.nbytes(0) - first_bytes
        alone.clear(0, 2)
    except Exception as error:
        raise ConfigError(f"{type(model).__name__} cannot generate here: {first_line(error)}") from error
    if not all(logits.isfinite().all() for logits in expected):
        raise ConfigError(f"{type(model).__name__} computes numbers that are not finite: its weights are broken")
    unheld = ConfigError(f"{type(model).__name__} keeps its memory of the text in a form this engine cannot hold")
    if torch.equal(without_prompt, expected[1]):
        raise unheld
    reason = _why_not_batched(model)
    if reason is None:
        batched = SlotForward(model, max_len)
        reason = _why_batched_differs(batched, tokens, expected) or _long_context_mismatch(
            model, batched, tokens, max_len
        )
        if reason is None:
            # A fresh one: the other has grown to the length of its trial.
            return Choice(SlotForward(model, max_len, capture), SequenceBytes(batched.bytes_per_token), "")
    if not is_same(torch.stack(_probe_in_turn(alone, tokens)), expected):
        raise unheld  # in the model itself: everybody's
    logger.warning("%s is served one request after the other, not as a batch: %s", type(model).__name__, reason)
    return Choice(alone, SequenceBytes(bytes_per_token, first_bytes - bytes_per_token), reason)


def embedding_size(model: PreTrainedModel) -> int:
    """How many token ids the model can be fed."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def first_line(error: BaseException) -> str:
    """What happened, short enough for one line of a log or a terminal."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


class SlotForward:
    """All tokens of a step in one row and one pass, whoever they belong to."""

    is_batched = True

    def __init__(self, model: PreTrainedModel, max_len: int, capture: Capture | None = None) -> None:
        """`capture`: how passes that repeat are recorded; None: they are not."""
        self.model = model
        config = model.config.get_text_config(decoder=True)
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        self.cache = SlotCache(windows, max_len, model.device)
        cache = self.cache
        self.clear, self.save, self.load, self.copy = cache.clear, cache.save, cache.load, cache.copy
        self.graphs = None if capture is None else DecodeGraphs(cache, self.logits, self._feed_as_it_is, capture)

    def bound_slots(self, max_slots: int) -> None:
        self.cache.max_slots = max_slots

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    @property
    def is_complete(self) -> bool:
        return self.cache.is_complete

    def feed(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        if self.graphs is not None and self.is_complete and all(len(item.token_ids) == 1 for item in inputs):
            return self.graphs.feed(inputs)
        return self._feed_as_it_is(inputs)

    def _feed_as_it_is(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        device = self.model.device
        placement = self.cache.place(inputs)
        ends = itertools.accumulate(len(item.token_ids) for item in inputs)
        token_ids = on_device([id_ for item in inputs for id_ in item.token_ids], device)
        # Of a prompt only the last token's logits: all of them would be the largest tensor there is.
        return self.logits(token_ids, placement.positions, on_device([end - 1 for end in ends], device))

    def logits(self, token_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """One pass over a row of tokens that the cache has a place for; the logits of the wanted ones."""
        with attention_over(self.cache, self.model):
            output = self.model(
                input_ids=token_ids[None],  # (1, T)
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=wanted,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def random_kv(self, length: int) -> SavedSlot:
        """Random keys and values in the shape of a slot's, for trials. The later in the text, the larger the values, so
        that whoever sees less of it, or more, computes something else."""
        generator = torch.Generator().manual_seed(0)
        growing = torch.linspace(-2, 2, length)[:, None]

        def like(memory: torch.Tensor, added: torch.Tensor | float) -> torch.Tensor:
            shape = (memory.shape[0], length, memory.shape[2])
            return (torch.rand(shape, generator=generator) * 2 - 1 + added).to(memory.dtype)

        return SavedSlot(tuple((like(k, 0.0), like(v, growing)) for k, v in self.cache.save(0, 0).layers))


@dataclass(frozen=True, slots=True)
class SavedCache:
    """A request's own cache, whole, in the host's memory."""

    cache: DynamicCache

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.cache))


class SingleForward:
    """One request a pass with the cache the library itself would use: right for every model `generate` can run."""

    is_batched = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        # Mamba and its kin call the same object by another name.
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._caches: dict[int, DynamicCache] = {}
        self._unread: dict[int, tuple[int, ...]] = {}
        """Beginnings of prompts. A model of unknown kind may not be able to continue one, so it gets them whole."""

    def bound_slots(self, max_slots: int) -> None:
        pass

    def feed(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        (item,) = inputs
        token_ids = self._unread.pop(item.slot, ()) + item.token_ids
        if not item.is_last:
            self._unread[item.slot] = token_ids
            return torch.empty((1, 0))
        cache = self._caches.get(item.slot)
        if cache is None:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            self._caches[item.slot] = cache
        arguments: dict[str, Any] = {self._cache_name: cache, **self._extra}
        if self._takes_positions:
            # As `generate` does: some models (Bamba) count wrongly by themselves.
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
        self._unread.pop(slot, None)

    def save(self, slot: int, length: int) -> SavedCache:
        return SavedCache(_copied(self._caches[slot], torch.device("cpu")))

    def load(self, slot: int, saved: SavedCache, length: int) -> None:
        self._caches[slot] = _copied(saved.cache, self.model.device)

    def copy(self, source: int, slot: int, length: int) -> None:
        raise NotImplementedError("a state of unknown kind is not shared")

    def nbytes(self, slot: int) -> int:
        return SavedCache(self._caches[slot]).nbytes


def _copied(cache: DynamicCache, device: torch.device) -> DynamicCache:
    return copy.deepcopy(cache, {id(tensor): tensor.to(device, copy=True) for tensor in _tensors(cache)})


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Wherever they are: layers keep their states in attributes, lists, dictionaries and objects of their own."""
    tensors, seen = [], set()
    held: list[Any] = [cache]
    while held:
        one = held.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            tensors.append(one)
        elif isinstance(one, Mapping):
            held += one.values()
        elif isinstance(one, list | tuple):
            held += one
        elif hasattr(one, "__dict__") and not isinstance(one, type):
            held += vars(one).values()
    return tensors


# --- which models may run over slots ------------------------------------------------------------------------------


def _why_not_batched(model: PreTrainedModel) -> str | None:
    """What the model says of itself that rules slots out; None: nothing does."""
    config = model.config.get_text_config(decoder=True)
    if not model._supports_attention_backend or model._is_stateful:
        return "its attention cannot be exchanged"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it computes the logits of all tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}, which was asked for"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "its layers keep states other than keys and values"
    known = {"full_attention", "sliding_attention"}
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) is not None or not known.issuperset(layer_types or ()):
        return "it attends in chunks"
    if {"dynamic", "longrope"} & _rope_types(config):
        return "its rotary frequencies follow the longest sequence of a pass, so they would change each other"
    return None


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding, whether given once or by layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(p.get("rope_type", "default")) for p in [parameters, *nested]}


_PROBED = ((0, 8), (1, 5))
"""Slots, and how long the prompts in them are."""


def _probe_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """A dozen different ids, spread over the vocabulary."""
    vocab_size = embedding_size(model)
    return tuple((7 + n * 7919) % vocab_size for n in range(12))


def _probe_logits(alone: SingleForward, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """What two requests give alone: a prompt, then one token each."""
    logits = []
    for slot, num_prompt in _PROBED:
        alone.feed([SlotInput(slot, 0, tokens[:num_prompt], is_last=True)])
        logits.append(alone.feed([SlotInput(slot, num_prompt, tokens[num_prompt : num_prompt + 1], is_last=True)])[0])
        alone.clear(slot, num_prompt + 1)
    return logits


def _probe_in_turn(alone: SingleForward, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """The same, but one reads its prompt before the other goes on."""
    for slot, num_prompt in _PROBED:
        alone.feed([SlotInput(slot, 0, tokens[:num_prompt], is_last=True)])
    logits = [alone.feed([SlotInput(slot, n, tokens[n : n + 1], is_last=True)])[0] for slot, n in _PROBED]
    for slot, num_prompt in _PROBED:
        alone.clear(slot, num_prompt + 1)
    return logits


def _why_batched_differs(batched: SlotForward, tokens: tuple[int, ...], expected: Sequence[torch.Tensor]) -> str | None:
    """Run the same two requests in slots, one of the prompts in parts beside the other's, then both last tokens."""
    try:
        batched.feed([SlotInput(1, 0, tokens[:4], is_last=False), SlotInput(0, 0, tokens[:3], is_last=False)])
        batched.feed([SlotInput(1, 4, tokens[4:5], is_last=True), SlotInput(0, 3, tokens[3:8], is_last=True)])
        logits = batched.feed([SlotInput(0, 8, tokens[8:9], is_last=True), SlotInput(1, 5, tokens[5:6], is_last=True)])
    except Exception as error:
        return f"its code does not take tokens of several sequences in a row ({first_line(error)})"
    finally:
        batched.clear(0, 9)
        batched.clear(1, 6)
    if not batched.is_complete:
        return "some of its layers are left out"
    return None if is_same(logits, expected) else "its answers change when several sequences share a pass"


def _long_context_mismatch(
    model: PreTrainedModel, batched: SlotForward, tokens: tuple[int, ...], max_len: int
) -> str | None:
    """One token deep in a text, where windows have closed and whatever depends on the position is at its largest.

    The text before it is made up, as keys and values: to compute real ones takes as long as to read such a prompt.
    """
    length = min(max_len - 1, int(free_bytes(model.device) * SHARE_FOR_PROBE) // batched.bytes_per_token)
    if length < len(tokens):
        return None  # nothing that has not been tried
    saved = batched.random_kv(length)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    alone = SingleForward(model)
    item = SlotInput(0, length, tokens[:1], is_last=True)
    try:
        for index, (keys, values) in enumerate(saved.layers):
            cache.update(keys[None].to(model.device), values[None].to(model.device), index)
        alone.load(0, SavedCache(cache), length)
        expected = alone.feed([item])
        batched.load(0, saved, length)
        logits = batched.feed([item])
    except Exception as error:
        return f"its code does not go on from a long text ({first_line(error)})"
    return None if is_same(logits, expected) else "its answers change in long texts"
