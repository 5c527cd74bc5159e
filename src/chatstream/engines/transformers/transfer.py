"""What a step tells the device: slots, positions, temperatures."""

from __future__ import annotations

from typing import Any

import torch


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers, nested as they are shaped, as a tensor there. Nobody waits for a copy to a GPU: its memory is pinned."""
    return _on_host(values, device, dtype).to(device, non_blocking=True)


def fill(tensor: torch.Tensor, values: Any) -> None:
    """The same into a tensor that is there already."""
    tensor.copy_(_on_host(values, tensor.device, tensor.dtype), non_blocking=True)


def _on_host(values: Any, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
