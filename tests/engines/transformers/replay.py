"""A stand-in for a CUDA graph, on any device: the operations of a pass, recorded and replayed without Python.

As with a CUDA graph, each result keeps its memory, and Python values are frozen. Operations that read a value from the
device, or copy one from Python to it, cannot be recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from chatstream.engines.transformers.decode_graphs import Compute

aten = torch.ops.aten
READS_FROM_DEVICE = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
)
COPIES_FROM_PYTHON = (aten.lift_fresh.default,)
"""The operation of `torch.tensor` on a list."""


class RecordedPass(TorchDispatchMode):
    """A `Graph` without CUDA: it records the operations of a pass and replays them."""

    def __init__(self, compute: Compute, device: torch.device, share_with: object | None = None) -> None:
        super().__init__()
        self._device = device
        self._operations: list[tuple[Any, Any, dict[str, Any], list[Any]]] = []
        compute()  # to warm up
        with self:
            self.output = compute()
        self.output.fill_(float("nan"))  # a capture computes nothing

    def replay(self) -> None:
        for function, args, kwargs, outputs in self._operations:
            again = _tensors(function(*args, **kwargs))
            for output, value in zip(outputs, again, strict=True):
                if output is not value:
                    output.copy_(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in READS_FROM_DEVICE + COPIES_FROM_PYTHON:
            raise RuntimeError(f"{function} cannot be captured")
        with self:
            result = function.decompose(*args, **kwargs)  # its parts may be operations that cannot be captured
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = _tensors(result)
        if any(tensor.device != self._device for tensor in [*_tensors((args, kwargs)), *made]):
            raise RuntimeError(f"{function} copies to or from the device, or computes elsewhere")
        is_view = any(tensor.untyped_storage().data_ptr() in given for tensor in made)
        if function._schema.is_mutable or not is_view:
            self._operations.append((function, args, kwargs, made))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]
