"""What a step tells the device: slots, positions, temperatures."""

from __future__ import annotations

from typing import Any

import torch


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers, nested as they are shaped, as a tensor there. Nobody waits for a copy to a GPU: its memory is pinned."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
