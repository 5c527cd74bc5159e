"""Whether two ways to compute the same logits agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_same(logits: torch.Tensor, expected: Sequence[torch.Tensor] | torch.Tensor) -> bool:
    """Only rounding differs.

    Half precision rounds coarsely, and a mixture of experts may even take another expert because of it; a wrong mask or
    position gives errors of the order of 1.
    """
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.2
    pairs = zip(logits.float(), expected, strict=True)
    return all(bool((row - alone.float()).norm() <= tolerance * alone.float().norm()) for row, alone in pairs)
