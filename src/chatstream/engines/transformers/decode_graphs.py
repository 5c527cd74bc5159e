"""Decode steps captured as CUDA graphs and replayed.

A GPU computes a decode step in less time than Python needs to launch its kernels one by one. A captured step is one
launch, but it computes the same shapes in the same memory each time. So these passes are *static*: one token in each of
the first 1, 2, 4, 8 ... slots, in use or not, attending to the first 256, 512, 1024 ... positions. One tensor on the
device holds tokens, positions and slots; it is filled before each replay, and the masks are computed from it there.
Only the slots of the step are written (`SlotCache.place_static`). Other slots, with a slow reader or an incomplete
prompt, are unchanged. Graphs take no slot memory of their own: shapes end where the slots' memory ends.

A graph must reproduce the logits of a plain step before it is used. After a failure all steps run without graphs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.kv_cache import SlotCache
from chatstream.engines.transformers.same_logits import is_close
from chatstream.engines.transformers.slot_memory import CAPACITY_STEP_TOKENS
from chatstream.engines.transformers.transfer import copy_into

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Each graph keeps its logits, (slots, vocab_size), on the device. Further shapes run without a graph until the slots'
memory moves, which discards all graphs."""
CAPTURED_AT_STEP = 8
"""A shape is captured at its 8th step. A capture takes as long as several steps, and shapes change with each request
that starts."""
WARM_UP_PASSES = 2
"""Passes before a capture. In them libraries choose algorithms and allocate workspaces, which cannot be captured."""

LogitsAfter = Callable[[Sequence[SlotInput]], torch.Tensor]
"""See `Forward.logits_after`."""
ForwardPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""See `SlotForward.forward_pass`."""
Compute = Callable[[], torch.Tensor]


class Graph(Protocol):
    """A recorded computation, bound to the memory that it was recorded with."""

    output: torch.Tensor
    """The result. Each replay overwrites it."""

    def replay(self) -> None:
        """Compute again, from the present contents of that memory."""


Capture = Callable[[Compute, torch.device, Any], Graph]
"""Record a computation on a device. The last argument is None or a graph to share memory with; the two are never
replayed at the same time."""


class DecodeGraphs:
    """The static passes of one model."""

    def __init__(self, cache: SlotCache, forward_pass: ForwardPass, eager: LogitsAfter, capture: Capture) -> None:
        """`eager`: `logits_after` without a graph."""
        self.num_replays = 0
        self.has_failed = False
        self._cache = cache
        self._forward_pass = forward_pass
        self._eager = eager
        self._capture = capture
        self._discard_graphs(0)

    def logits_after(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Logits after each input, (len(inputs), vocab_size). Each input is one token; the cache is complete."""
        shape = self.shape_of(inputs)
        if shape in self._verified:
            try:
                self.num_replays += 1
                return self._passes[shape].replay(inputs)
            except Exception:
                self._disable()
        logits = self._eager(inputs)
        if not self.has_failed:
            try:
                self._capture_or_verify(shape, inputs, logits)
            except Exception:
                self._disable()
        return logits

    def shape_of(self, inputs: Sequence[SlotInput]) -> tuple[int, int]:
        """Slots and positions of the smallest static pass for these inputs, within the allocated memory."""
        num_slots, kv_len = (
            max(item.slot for item in inputs) + 1,
            max(item.start for item in inputs) + 1,
        )
        allocated_slots, capacity, num_moves = self._cache.reserve(num_slots, kv_len)
        if num_moves != self._num_moves:
            self._discard_graphs(num_moves)  # they compute in memory that has been released
        steps = _power_of_two(-(-kv_len // CAPACITY_STEP_TOKENS))
        return min(_power_of_two(num_slots), allocated_slots), min(steps * CAPACITY_STEP_TOKENS, capacity)

    def _capture_or_verify(self, shape: tuple[int, int], inputs: Sequence[SlotInput], expected: torch.Tensor) -> None:
        """Capture the shape, or verify its graph. A graph is verified one step after its capture, with other inputs.

        Raises `ArithmeticError` if the graph's logits differ from `expected`.
        """
        self._num_seen[shape] += 1
        if shape in self._passes:
            # Logits that are not finite are an error of one request, not of the graph.
            if not is_close(self._passes[shape].replay(inputs).nan_to_num(), expected.nan_to_num()):
                raise ArithmeticError(f"a graph of {shape[0]} slots of {shape[1]} tokens gives other logits")
            self._verified.add(shape)
        elif self._num_seen[shape] == CAPTURED_AT_STEP and len(self._passes) < MAX_GRAPHS:
            share_with = next((other.graph for other in self._passes.values()), None)
            self._passes[shape] = StaticPass(self._cache, self._forward_pass, shape, inputs, self._capture, share_with)

    def _discard_graphs(self, num_moves: int) -> None:
        self._num_moves = num_moves
        self._num_seen: Counter[tuple[int, int]] = Counter()
        self._passes: dict[tuple[int, int], StaticPass] = {}
        self._verified: set[tuple[int, int]] = set()

    def _disable(self) -> None:
        logger.warning("a CUDA graph failed; all further steps run without graphs", exc_info=True)
        self.has_failed = True
        self._discard_graphs(self._num_moves)


class StaticPass:
    """A captured pass of one shape."""

    def __init__(
        self,
        cache: SlotCache,
        forward_pass: ForwardPass,
        shape: tuple[int, int],
        inputs: Sequence[SlotInput],
        capture: Capture,
        share_with: Graph | None = None,
    ) -> None:
        """Capture the pass with `inputs`, which have just been computed; the capture may compute them again."""
        self._cache = cache
        self._forward_pass = forward_pass
        self._num_slots, self._kv_len = shape
        # Token ids, positions and slots, as in `_write_inputs`.
        self._inputs = torch.zeros((3, self._num_slots), dtype=torch.int64, device=cache.device)
        self._write_inputs(inputs)
        self.graph = capture(self._compute, cache.device, share_with)

    def replay(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Logits after each input, (len(inputs), vocab_size)."""
        self._write_inputs(inputs)
        self.graph.replay()
        return self.graph.output[: len(inputs)].clone()  # the next replay of any graph may write there

    def _write_inputs(self, inputs: Sequence[SlotInput]) -> None:
        """Write token id and position by slot, 0 for a slot without an input; then the slots, the last one repeated."""
        token_ids, positions = [0] * self._num_slots, [0] * self._num_slots
        for item in inputs:
            (token_ids[item.slot],) = item.token_ids
            positions[item.slot] = item.start
        slots = [item.slot for item in inputs]
        copy_into(self._inputs, [token_ids, positions, slots + slots[-1:] * (self._num_slots - len(slots))])

    def _compute(self) -> torch.Tensor:
        token_ids, positions, slots = self._inputs
        self._cache.place_static(slots, positions, self._kv_len)
        return self._forward_pass(token_ids, positions, slots)  # (num_slots, vocab_size), in the order of `slots`


class CudaGraph:
    """A `Graph` recorded by torch. Graphs that share memory use one pool for their intermediate tensors."""

    def __init__(self, compute: Compute, device: torch.device, share_with: CudaGraph | None) -> None:
        caller = torch.cuda.current_stream(device)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device) if share_with is None else share_with._stream
        self._graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):  # restores the caller's stream even if torch.cuda.graph fails to
            try:
                for _ in range(WARM_UP_PASSES):
                    compute()
            finally:
                caller.wait_stream(self._stream)  # here, because a capture itself runs no kernel
            pool = None if share_with is None else share_with._graph.pool()
            # "thread_local": other threads may use the GPU during the capture.
            with torch.cuda.graph(self._graph, pool, self._stream, capture_error_mode="thread_local"):
                self.output = compute()

    def replay(self) -> None:
        self._graph.replay()


def capture_on(device: torch.device, wanted: str) -> Capture | None:
    """How to capture passes on this device; None: do not. `wanted` is `LoadSettings.cuda_graphs`."""
    return CudaGraph if device.type == "cuda" and wanted == "auto" else None


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
