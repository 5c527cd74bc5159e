"""Linear layers whose weights lie in the order in which the CPU's kernels read them.

A plain `torch.nn.Linear` hands its kernel a row-major matrix in every pass. Reordered once, when the model is loaded,
a step over a few tokens reads the weights at nearly the speed that memory has. How much that gives depends on the
processor, the type and the build of torch, and the operators are private ones of torch (its own compiler uses them for
frozen weights). So `why_not` tries them on layers of the model at hand, and the model stays as it is where they fail,
differ or gain too little.

Measured with torch 2.13 on two cores of an AMD EPYC with avx512_bf16, a Qwen2-shaped model of 0.5B: a step of 1, 8 or
32 tokens 1.4 times as fast in bfloat16, to the same bit; 1.5, 3 and 1.9 times as fast in float32, with other rounding.

What else there is: `torch.utils.mkldnn`, which is public, keeps the row-major order and was slower than the plain
layer. `torch.compile` with frozen weights compiles for 20 s for each number of tokens, and was no faster. Intel's
extension for PyTorch was archived in 2026. torchao quantises, which changes the answers. Projections that share an
input, fused into one matrix: less than 5 % of a step, and one would have to know every architecture.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

logger = logging.getLogger(__name__)

_ROWS_HINT = 8
"""Rows that the order is chosen for: a few generations side by side. It is right, and good, for any number."""
_WORTHWHILE = 1.05
"""Times as fast; what is less may be noise."""
_SMALL_BYTES = 16 << 20
"""A smaller model lies in the processor's cache: nothing to gain, and nothing that could be measured."""
_SAMPLE_BYTES = 32 << 20
"""Layers that are timed: more than most caches hold, little enough for a quarter of a second."""
_ROUNDS = 10
_CHECKED_ROWS = 4096
"""Of a weight, to see whether packing gives the same: a head has a row for each token of the vocabulary."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative to the largest number of a result."""


class PackedLinear(nn.Module):
    """What the linear layer computed, from a weight in an order of oneDNN's own. For inference only.

    The weight is no parameter: it is not saved, moved or converted.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` comes from `reordered`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.was_read = False
        """Somebody used the weight itself. Putting it back in order each time is right, but slow."""
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
    """(out_features, in_features), dense, on the CPU -> the same in oneDNN's layout. Raises `RuntimeError`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    return packed


@torch.inference_mode()
def why_not(model: nn.Module, *, must_gain: bool = True) -> str | None:
    """Why this model cannot be packed or, if it `must_gain`, would not be faster here. None: pack it.

    Computes with a layer of each shape, and times some: less than half a second on a free machine.
    """
    linears = [linear for _, _, linear in _linears(model)]
    if not linears:
        return "it has no linear layers in bfloat16 or float32 on the CPU"
    reason = _why_impossible(linears)
    if reason is not None or not must_gain:
        return reason
    if sum(linear.weight.nbytes for linear in linears) < _SMALL_BYTES:
        return "it is so small that it stays in the processor's cache"
    return _why_slower(linears)


@torch.inference_mode()
def prepack(model: nn.Module, on_packed: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Replace the linear layers, one after the other: at no time are two of them there in both forms.

    A head that shares its weight with the embedding gets a copy: the embedding still needs rows. `on_packed` is called
    with the bytes of each weight.
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


def restore_read(model: nn.Module) -> None:
    """Make those layers plain again whose weight somebody used since the model was packed. Call it after a trial run.

    Some models reach into their layers, as Mamba does.
    """
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in places:
        if isinstance(child, PackedLinear) and child.was_read:
            setattr(parent, name, child.unpacked())


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Where the plain linear layers are. Not their subclasses, nor layers with quantised weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Linear
                and type(child.weight) is nn.Parameter
                and child.weight.dtype in _TOLERANCE
                and child.weight.device.type == "cpu"
            ):
                yield parent, name, child


# --- trying it out ------------------------------------------------------------------------------------------------


def _why_impossible(linears: list[nn.Linear]) -> str | None:
    """One layer of each shape is computed both ways."""
    for linear in {(linear.weight.shape, linear.weight.dtype): linear for linear in linears}.values():
        rows = _rows(8, linear)
        weight = linear.weight[:_CHECKED_ROWS]
        bias = None if linear.bias is None else linear.bias[:_CHECKED_ROWS]
        expected = nn.functional.linear(rows, weight, bias)
        if not torch.isfinite(expected).all():
            return "its weights are not finite numbers"
        try:
            found = PackedLinear(reordered(weight), bias)(rows)
        except (AttributeError, RuntimeError) as error:
            return f"this torch or this processor cannot do it: {str(error).splitlines()[0]}"
        # Sums in another order round otherwise; what is wrong is wrong by far more.
        tolerance = _TOLERANCE[linear.weight.dtype] * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=tolerance):
            return "packed layers compute something else"
    return None


def _why_slower(linears: list[nn.Linear]) -> str | None:
    sample: list[nn.Linear] = []
    # Not the head, which comes first and is the largest by far.
    for linear in [linear for linear in linears if linear.weight.nbytes <= _SAMPLE_BYTES] or linears[-1:]:
        sample.append(linear)
        if sum(layer.weight.nbytes for layer in sample) >= _SAMPLE_BYTES:
            break
    packed = [PackedLinear(reordered(linear.weight), linear.bias) for linear in sample]
    alone, together = (_gain(sample, packed, num_rows) for num_rows in (1, 8))
    gain = f"{alone:.2f} times as fast with 1 token a step, {together:.2f} with 8"
    if min(alone, together) < _WORTHWHILE:
        return f"it gains too little here ({gain})"
    logger.info("prepacked linear layers are %s", gain)
    return None


def _gain(plain: list[nn.Linear], packed: list[PackedLinear], num_rows: int) -> float:
    inputs = [_rows(num_rows, linear) for linear in plain]
    # In turn, all layers before the first one again (it would still lie in the cache), and the best time of each layer:
    # what else the machine does only ever adds time.
    rounds = [(layer_times_s(plain, inputs), layer_times_s(packed, inputs)) for _ in range(_ROUNDS)]
    plain_s, packed_s = (sum(map(min, *times), start=0.0) for times in zip(*rounds, strict=True))
    return plain_s / packed_s


def layer_times_s(layers: list[nn.Linear] | list[PackedLinear], inputs: list[torch.Tensor]) -> list[float]:
    times_s = []
    for layer, rows in zip(layers, inputs, strict=True):
        start_s = time.perf_counter()
        layer(rows)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def _rows(num_rows: int, linear: nn.Linear) -> torch.Tensor:
    """Numbers of ordinary size, the same each time: (num_rows, in_features)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, linear.in_features, generator=generator).to(linear.weight.dtype)
