"""Linear layers with weights in the layout that the CPU's kernels read.

A plain `torch.nn.Linear` passes its kernel a row-major matrix each time. With weights reordered once, when the model is
loaded, a step of a few tokens reads them at nearly memory speed. The gain depends on the processor, the dtype and the
build of torch, and the operators are private ones of torch (its own compiler uses them for frozen weights). So
`packing_obstacle` tries them on layers of the loaded model, which stays plain if they fail, differ or gain too little.

Measured with torch 2.13 on two cores of an AMD EPYC with avx512_bf16, a Qwen2-shaped model of 0.5B: a step of 1, 8 or
32 tokens 1.4 times as fast in bfloat16, to the same bit; 1.5, 3 and 1.9 times as fast in float32, with other rounding.

Alternatives: `torch.utils.mkldnn`, which is public, keeps the row-major order and was slower than the plain layer.
`torch.compile` with frozen weights compiles for 20 s for each number of tokens, and was no faster. Intel's extension
for PyTorch was archived in 2026. torchao quantises, which changes the answers. Fusing projections that share an input
gains less than 5 % of a step and needs code for each architecture.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

logger = logging.getLogger(__name__)

_ROWS_HINT = 8
"""Rows of input that the layout is chosen for: a few generations. It is correct, and fast, for any number."""
_MIN_GAIN = 1.05
"""Minimum speed-up; less may be noise."""
_SMALL_BYTES = 16 << 20
"""A model smaller than this stays in the processor's cache: there is no gain, and none could be measured."""
_SAMPLE_BYTES = 32 << 20
"""Bytes of the layers that are timed: larger than most caches, and timed in a quarter of a second."""
_ROUNDS = 10
_CHECKED_ROWS = 4096
"""Rows of a weight that are compared. The output layer has a row for each token of the vocabulary."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Tolerances relative to the largest number of a result."""


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout. For inference only.

    The weight is not a parameter: it is not saved, moved or converted.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight`: a result of `reordered`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.was_read = False
        """`weight` was read, which is correct but slow: each read reorders the whole weight."""
        self.packed = weight

    @property
    def weight(self) -> torch.Tensor:
        self.was_read = True
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), both of the weight's dtype."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def unpacked(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.packed.to_dense(), requires_grad=False)
        plain.bias = self.bias  # type: ignore[assignment]  # torch's annotation forgets that it may be None
        return plain

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def reordered(weight: torch.Tensor) -> torch.Tensor:
    """Convert a dense weight on the CPU, (out_features, in_features), to oneDNN's layout. Raises `RuntimeError`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    return packed


@torch.inference_mode()
def packing_obstacle(model: nn.Module, *, must_gain: bool = True) -> str | None:
    """Why this model cannot be packed or, if it `must_gain`, would not be faster. None: pack it.

    Computes with a layer of each shape and times some: less than half a second on an idle machine.
    """
    linears = [linear for _, _, linear in _linears(model)]
    if not linears:
        return "it has no linear layers in bfloat16 or float32 on the CPU"
    obstacle = _correctness_obstacle(linears)
    if obstacle is not None or not must_gain:
        return obstacle
    if sum(linear.weight.nbytes for linear in linears) < _SMALL_BYTES:
        return "it is small enough to stay in the processor's cache"
    return _speed_obstacle(linears)


@torch.inference_mode()
def prepack(model: nn.Module, on_packed: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Replace the linear layers one by one, so that at most one weight is in memory twice.

    An output layer that shares its weight with the embedding gets a copy, because the embedding needs plain rows.
    `on_packed` is called with the bytes of each weight.
    """
    by_weight: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent, name, linear in _linears(model):
        by_weight.setdefault(id(linear.weight), []).append((parent, name))
    for places in by_weight.values():
        weight: torch.Tensor | None = None
        for parent, name in places:
            linear = getattr(parent, name)
            if weight is None:
                weight = reordered(linear.weight)
            setattr(parent, name, PackedLinear(weight, linear.bias))
        on_packed(linear.weight.nbytes)


def unpack_read_layers(model: nn.Module) -> None:
    """Make layers plain again if their weight was read since the model was packed. Call it after a trial run.

    Some models, such as Mamba, read the weights of their layers.
    """
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in places:
        if isinstance(child, PackedLinear) and child.was_read:
            setattr(parent, name, child.unpacked())


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Plain linear layers, with parent and name. Subclasses and layers with quantised weights are omitted."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Linear
                and type(child.weight) is nn.Parameter
                and child.weight.dtype in _TOLERANCE
                and child.weight.device.type == "cpu"
            ):
                yield parent, name, child


# --- the trial ----------------------------------------------------------------------------------------------------


def _correctness_obstacle(linears: list[nn.Linear]) -> str | None:
    """Compute one layer of each shape plain and packed. Why they cannot be packed, or None."""
    for linear in {(linear.weight.shape, linear.weight.dtype): linear for linear in linears}.values():
        rows = _rows(8, linear)
        weight = linear.weight[:_CHECKED_ROWS]
        bias = None if linear.bias is None else linear.bias[:_CHECKED_ROWS]
        expected = nn.functional.linear(rows, weight, bias)
        if not torch.isfinite(expected).all():
            return "its weights are not finite numbers"
        try:
            actual = PackedLinear(reordered(weight), bias)(rows)
        except (AttributeError, RuntimeError) as error:
            return f"this torch or this processor does not support it: {str(error).splitlines()[0]}"
        # Sums in another order are rounded differently. Real errors are far larger than this tolerance.
        tolerance = _TOLERANCE[linear.weight.dtype] * float(expected.abs().max())
        if not torch.allclose(actual, expected, rtol=0, atol=tolerance):
            return "packed layers give different results"
    return None


def _speed_obstacle(linears: list[nn.Linear]) -> str | None:
    """Time some layers plain and packed. The gain, if it is too small, or None."""
    sample: list[nn.Linear] = []
    # Without the output layer, which comes first and is the largest by far.
    for linear in [linear for linear in linears if linear.weight.nbytes <= _SAMPLE_BYTES] or linears[-1:]:
        sample.append(linear)
        if sum(layer.weight.nbytes for layer in sample) >= _SAMPLE_BYTES:
            break
    packed = [PackedLinear(reordered(linear.weight), linear.bias) for linear in sample]
    gain_1, gain_8 = (_gain(sample, packed, num_rows) for num_rows in (1, 8))
    gain = f"{gain_1:.2f} times as fast with 1 token a step, {gain_8:.2f} with 8"
    if min(gain_1, gain_8) < _MIN_GAIN:
        return f"it gains too little here ({gain})"
    logger.info("prepacked linear layers are %s", gain)
    return None


def _gain(plain: list[nn.Linear], packed: list[PackedLinear], num_rows: int) -> float:
    """Plain time divided by packed time, with `num_rows` rows of input."""
    inputs = [_rows(num_rows, linear) for linear in plain]
    # All layers in each round, so that no weight is still in the cache; plain and packed alternate. The best time of
    # each layer counts, because other work on the machine only adds time.
    rounds = [(layer_times_s(plain, inputs), layer_times_s(packed, inputs)) for _ in range(_ROUNDS)]
    plain_s, packed_s = (sum(map(min, *times), start=0.0) for times in zip(*rounds, strict=True))
    return plain_s / packed_s


def layer_times_s(layers: list[nn.Linear] | list[PackedLinear], inputs: list[torch.Tensor]) -> list[float]:
    """Seconds that each layer takes for its input, (num_rows, in_features)."""
    times_s = []
    for layer, rows in zip(layers, inputs, strict=True):
        start_s = time.perf_counter()
        layer(rows)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def _rows(num_rows: int, linear: nn.Linear) -> torch.Tensor:
    """Standard normal input, the same each time: (num_rows, in_features), in the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, linear.in_features, generator=generator).to(linear.weight.dtype)
