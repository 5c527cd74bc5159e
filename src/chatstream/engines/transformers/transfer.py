"""Copies of a step's host values, such as slots, positions and temperatures, to the device."""

from __future__ import annotations

from typing import Any

import torch


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Create a tensor on `device` from nested numbers. A copy to a GPU comes from pinned memory and does not block."""
    return _on_host(values, device, dtype).to(device, non_blocking=True)


def copy_into(tensor: torch.Tensor, values: Any) -> None:
    """Copy nested numbers into an existing tensor, as `on_device` does."""
    tensor.copy_(_on_host(values, tensor.device, tensor.dtype), non_blocking=True)


def _on_host(values: Any, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
