"""The checkpoint files in the package: small, complete, and readable by transformers."""

import subprocess
import sys
from typing import Any

from safetensors.numpy import load_file

from chatstream.engines.demo import CHECKPOINT

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_checkpoint_is_complete_and_small_enough_for_the_wheel() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 5_000_000


def test_the_number_of_parameters_is_the_documented_one() -> None:
    tensors = load_file(CHECKPOINT / "model.safetensors")
    assert round(sum(tensor.size for tensor in tensors.values()) / 1e6) == 2
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}


def test_transformers_reads_the_same_files(reference: Any) -> None:
    assert type(reference).__name__ == "LlamaForCausalLM"
    assert reference.config.max_position_embeddings == 1024
    assert reference.generation_config.eos_token_id == reference.config.eos_token_id


def test_the_demo_model_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, chatstream.engines.demo as d; d.load(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
