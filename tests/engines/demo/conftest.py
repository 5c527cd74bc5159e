"""The bundled checkpoint loaded by transformers, as the reference."""

from __future__ import annotations

from typing import Any

import pytest

from chatstream.engines.demo import CHECKPOINT


@pytest.fixture(scope="session")
def reference() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
