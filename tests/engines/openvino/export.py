"""Writes `tiny/`, the exported model that these tests run: two layers of random weights in float32.

Run it in an environment with optimum-intel, which needs a different transformers version than the project
(docs/openvino.md). The committed files were written with optimum-intel 2.2.0, transformers 5.5.4, torch 2.13.0,
openvino 2026.4.1 and nncf 3.4.0:

    python -m tests.engines.openvino.export
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = Path(__file__).parent / "tiny"


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.engines.transformers.checkpoints import CONTEXT_LEN, train_tokenizer

    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT_LEN,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [3]
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    shutil.rmtree(TINY, ignore_errors=True)
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        optimum = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past", "--weight-format", "fp32", "--disable-convert-tokenizer"]
        subprocess.run([optimum, "export", "openvino", "--model", checkpoint, *task, TINY], check=True)
    _shrink(TINY / "openvino_model.xml")
    for file in TINY.glob("*.json"):  # removes machine paths and spurious differences
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False) + "\n", "utf-8")


def _shrink(network: Path) -> None:
    """Remove the indentation, a third of the file."""
    network.write_text(re.sub(r"(?m)^\t+", "", network.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
