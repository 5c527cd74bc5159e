"""A key of everything that determines the speed of a loaded model. See `Capacity.speed_key`."""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
import transformers
from transformers import PreTrainedModel


def speed_key(model: PreTrainedModel, *, with_graphs: bool = False) -> str:
    """One line, equal for two checkpoints of the same shape, dtype and layer types, whatever their weights are."""
    kinds = Counter(type(module).__name__ for module in model.modules())  # differ for quantised and prepacked layers
    shapes = Counter(str(tuple(parameter.shape)) for parameter in model.parameters())
    digest = hashlib.sha256(
        f"{model.config.to_json_string()} {sorted(kinds.items())} {sorted(shapes.items())}".encode()
    )
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return (
        f"{digest.hexdigest()[:32]} {model.dtype} on {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}{', CUDA graphs' * with_graphs}"
    )
