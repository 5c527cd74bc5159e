"""Steps in which everybody generates, captured as CUDA graphs and replayed.

A GPU computes such a step in less time than Python takes to ask for it, kernel by kernel. A captured one is asked for
in a single call, but computes the same shapes in the same memory each time. So these passes are *static*: one token in
each of the first 1, 2, 4, 8 … slots, whether anybody is there or not, and all look at the first 256, 512, 1024 …
positions. Who is where stands in one tensor on the device, filled before each replay, and masks are computed from it
there. Only slots that are fed are written (`SlotCache.place_static`): whoever is not in the step, a reader that lags or
half a prompt, stays as it was. No memory is taken for it: shapes end where the slots' memory does.

A graph is tried before it is used. Whatever goes wrong with one, all steps run as they are from then on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.kv_cache import SlotCache
from chatstream.engines.transformers.same_logits import is_same
from chatstream.engines.transformers.slot_memory import CAPACITY_STEP_TOKENS
from chatstream.engines.transformers.transfer import fill

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Each keeps its logits on the device, (slots, vocab_size). Further shapes run as they are, until memory moves
and all begin anew."""
CAPTURED_AT_STEP = 8
"""Of the same shape: a capture takes as long as several steps, and while people come, each comes with other shapes."""
WARM_UP_PASSES = 2
"""Before a capture. Libraries choose their algorithms and take their workspaces in them, which cannot be captured."""

Feeding = Callable[[Sequence[SlotInput]], torch.Tensor]
Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Compute = Callable[[], torch.Tensor]


class Graph(Protocol):
    """A computation that was recorded, and is tied to the memory it was recorded with."""

    output: torch.Tensor
    """What it returned. Every replay writes there."""

    def replay(self) -> None:
        """Compute once more, from what that memory holds now."""


Capture = Callable[[Compute, torch.device, Any], Graph]
"""Record a computation. Last comes another graph, which is never replayed at the same time, or None."""


class DecodeGraphs:
    """The static passes of one model."""

    def __init__(self, cache: SlotCache, logits: Logits, as_it_is: Feeding, capture: Capture) -> None:
        """`logits` computes a pass that the cache has a place for, from token ids (T,), their positions (T,) and the
        rows whose logits are wanted. `as_it_is` does what `feed` does, without a graph."""
        self.num_replays = 0
        self.has_failed = False
        self._cache = cache
        self._logits = logits
        self._eager = as_it_is
        self._capture = capture
        self._forget(0)

    def feed(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Logits after each input, all of which are single tokens. Every layer has been fed before."""
        shape = self.shape_of(inputs)
        if shape in self._tried:
            try:
                self.num_replays += 1
                return self._passes[shape].replay(inputs)
            except Exception:
                self._give_up()
        logits = self._eager(inputs)
        if not self.has_failed:
            try:
                self._prepare(shape, inputs, logits)
            except Exception:
                self._give_up()
        return logits

    def shape_of(self, inputs: Sequence[SlotInput]) -> tuple[int, int]:
        """Slots and positions of the smallest static pass for them, within the memory there is."""
        num_slots, kv_len = (
            max(item.slot for item in inputs) + 1,
            max(item.start for item in inputs) + 1,
        )
        has_slots, capacity, num_moves = self._cache.reserve(num_slots, kv_len)
        if num_moves != self._num_moves:
            self._forget(num_moves)  # what was captured computes with memory that is not ours any more
        steps = _power_of_two(-(-kv_len // CAPACITY_STEP_TOKENS))
        return min(_power_of_two(num_slots), has_slots), min(steps * CAPACITY_STEP_TOKENS, capacity)

    def _prepare(self, shape: tuple[int, int], inputs: Sequence[SlotInput], expected: torch.Tensor) -> None:
        """Capture the shape, or try what was captured: a step later, when everything that is told is different."""
        self._num_seen[shape] += 1
        if shape in self._passes:
            # Weights may be such that somebody's logits are not finite: that request's affair.
            if not is_same(self._passes[shape].replay(inputs).nan_to_num(), expected.nan_to_num()):
                raise ArithmeticError(f"other logits from a graph of {shape[0]} slots of {shape[1]} tokens")
            self._tried.add(shape)
        elif self._num_seen[shape] == CAPTURED_AT_STEP and len(self._passes) < MAX_GRAPHS:
            beside = next((other.graph for other in self._passes.values()), None)
            self._passes[shape] = StaticPass(self._cache, self._logits, shape, inputs, self._capture, beside)

    def _forget(self, num_moves: int) -> None:
        self._num_moves = num_moves
        self._num_seen: Counter[tuple[int, int]] = Counter()
        self._passes: dict[tuple[int, int], StaticPass] = {}
        self._tried: set[tuple[int, int]] = set()

    def _give_up(self) -> None:
        logger.warning("a step could not be captured as a CUDA graph: from now on all run without", exc_info=True)
        self.has_failed = True
        self._forget(self._num_moves)


class StaticPass:
    """One shape, captured."""

    def __init__(
        self,
        cache: SlotCache,
        logits: Logits,
        shape: tuple[int, int],
        inputs: Sequence[SlotInput],
        capture: Capture,
        beside: Graph | None = None,
    ) -> None:
        """Captured with what these inputs, which were just fed, say; they may be fed more than once in it."""
        self._cache = cache
        self._logits = logits
        self._num_slots, self._kv_len = shape
        self._told = torch.zeros((3, self._num_slots), dtype=torch.int64, device=cache.device)
        self._tell(inputs)
        self.graph = capture(self._compute, cache.device, beside)

    def replay(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Logits after each of them."""
        self._tell(inputs)
        self.graph.replay()
        return self.graph.output[: len(inputs)].clone()  # the next replay of any graph may write there

    def _tell(self, inputs: Sequence[SlotInput]) -> None:
        """By slot the token and its position, 0 where none is fed; then whose logits are wanted, the last repeated."""
        token_ids, positions = [0] * self._num_slots, [0] * self._num_slots
        for item in inputs:
            (token_ids[item.slot],) = item.token_ids
            positions[item.slot] = item.start
        slots = [item.slot for item in inputs]
        fill(self._told, [token_ids, positions, slots + slots[-1:] * (self._num_slots - len(slots))])

    def _compute(self) -> torch.Tensor:
        token_ids, positions, slots = self._told
        self._cache.place_static(slots, positions, self._kv_len)
        return self._logits(token_ids, positions, slots)  # (num_slots, vocab_size), in the order of `slots`


class CudaGraph:
    """What is asked of a GPU, recorded by torch. Graphs beside each other share the memory of what lies between."""

    def __init__(self, compute: Compute, device: torch.device, beside: CudaGraph | None) -> None:
        caller = torch.cuda.current_stream(device)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device) if beside is None else beside._stream
        self._graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):  # and back to the caller's, also where torch's own context fails to
            try:
                for _ in range(WARM_UP_PASSES):
                    compute()
            finally:
                caller.wait_stream(self._stream)  # a capture itself runs nothing
            pool = None if beside is None else beside._graph.pool()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool, self._stream, capture_error_mode="thread_local"):
                self.output = compute()

    def replay(self) -> None:
        self._graph.replay()


def capture_on(device: torch.device, wanted: str) -> Capture | None:
    """How passes are captured there; None: not at all. `wanted` is `LoadSettings.cuda_graphs`."""
    return CudaGraph if device.type == "cuda" and wanted == "auto" else None


def _power_of_two(number: int) -> int:
    """The smallest that is not below it."""
    return 1 << (number - 1).bit_length()
