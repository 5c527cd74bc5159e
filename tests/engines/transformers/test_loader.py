"""Loading: defaults, explicit settings, and weights that are copied into memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from chatstream.engines.loading.checkpoint_defaults import DEFAULT_MAX_CONTEXT_LEN
from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.errors import ConfigError
from chatstream.types import SamplingParams
from tests.engines.transformers.checkpoints import CONTEXT_LEN
from tests.engines.transformers.recording import answer, greedy, refusal_of, request_of

pytestmark = pytest.mark.anyio


# --- settings -----------------------------------------------------------------------------------------------------


def test_invalid_settings_of_the_step_engine_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="max_prompt_tokens_per_step"):
        create_engine("any", max_prompt_tokens_per_step=0)


async def test_a_context_longer_than_the_models_is_refused(checkpoint: Callable[[str], Path]) -> None:
    message = await refusal_of(str(checkpoint("llama")), load=LoadSettings(device="cpu", context_len=CONTEXT_LEN + 1))
    assert message == f"context_len {CONTEXT_LEN + 1} is more than the model's {CONTEXT_LEN} tokens"


async def test_an_unavailable_device_is_refused(checkpoint: Callable[[str], Path]) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    message = await refusal_of(str(checkpoint("llama")), load=LoadSettings(device=absent))
    assert message == f"device {absent} is not available here"


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        ("llama", None, CONTEXT_LEN),
        ("gpt2", None, CONTEXT_LEN),
        ("llama", 32, 32),
        ("mamba", None, DEFAULT_MAX_CONTEXT_LEN),
        ("mamba", 2 * DEFAULT_MAX_CONTEXT_LEN, 2 * DEFAULT_MAX_CONTEXT_LEN),
    ],
)
def test_the_context_is_the_models_or_the_setting(
    kind: str, wanted: int | None, expected: int, checkpoint: Callable[[str], Path]
) -> None:
    model = load(str(checkpoint(kind)), None, LoadSettings(device="cpu", context_len=wanted))
    assert model.runner.context_len == expected


def test_a_very_long_context_is_limited_by_default(copy_of: Callable[..., Path]) -> None:
    path = str(copy_of(max_position_embeddings=1_000_000))
    assert load(path, None, LoadSettings(device="cpu")).runner.context_len == DEFAULT_MAX_CONTEXT_LEN
    assert load(path, None, LoadSettings(device="cpu", context_len=20_000)).runner.context_len == 20_000


@pytest.mark.parametrize(
    ("stored", "wanted", "computed"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
async def test_the_dtype_is_the_checkpoints_except_float16_on_a_cpu(
    stored: str,
    wanted: str,
    computed: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="chatstream")
    shutil.copytree(checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    engine = create_engine(str(tmp_path), load=LoadSettings(dtype=wanted, device="cpu"))
    await engine.start()
    text, _ = await answer(engine, request_of([50, 60, 70], greedy(10)))
    await engine.stop()
    assert text
    assert f"torch.{computed} on cpu" in caplog.text


def test_the_checkpoints_recommendations_are_the_default_sampling(checkpoint: Callable[[str], Path]) -> None:
    model = load(str(checkpoint("llama")), None, LoadSettings(device="cpu"))
    assert model.default_sampling == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)


@pytest.mark.parametrize("nothing", [None, GenerationConfig()])
def test_a_loaded_model_without_recommendations_gets_the_defaults(
    nothing: GenerationConfig | None,
    reference: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = reference("qwen3")
    monkeypatch.setattr(model, "generation_config", nothing)
    assert load(model, tokenizer, LoadSettings()).default_sampling == SamplingParams()


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists mapped files")
@pytest.mark.parametrize("prepack", ["on", "off"])
def test_a_checkpoint_can_be_overwritten_while_it_is_served(
    prepack: Any, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Weights in the mapped file would change in the running model, or end the process with SIGBUS."""
    path = shutil.copytree(checkpoint("llama"), tmp_path / "copy")  # models of other tests may map the original
    model = load(str(path), None, LoadSettings(device="cpu", prepack=prepack))
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert model is not None


# --- names and loaded models --------------------------------------------------------------------------------------


def test_the_model_name_is_that_of_the_directory_or_the_hub(checkpoint: Callable[[str], Path]) -> None:
    assert create_engine(str(checkpoint("llama"))).model_name == "llama"
    assert create_engine(f"{checkpoint('llama')}/").model_name == "llama"
    assert create_engine("Qwen/Qwen3-0.6B").model_name == "Qwen/Qwen3-0.6B"
    assert create_engine("Qwen/Qwen3-0.6B", model_name="mine").model_name == "mine"


async def test_a_loaded_model_is_served_in_its_dtype(
    checkpoint: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
    engine = create_engine(model, tokenizer)
    assert engine.model_name == "llama"
    await engine.start()
    text, _ = await answer(engine, request_of([50, 60, 70], greedy(10)))
    await engine.stop()
    assert text
    assert model.dtype == torch.bfloat16


def test_a_loaded_model_needs_its_tokenizer_and_keeps_its_dtype(
    reference: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        create_engine(reference("llama"))
    with pytest.raises(ConfigError, match="keeps its dtype"):
        create_engine(reference("llama"), tokenizer, LoadSettings(dtype="float32"))


# --- without torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "transformers", "loky"])
def test_without_torch_or_transformers_the_error_names_the_package_to_install(missing: str) -> None:
    program = f"""
import sys
sys.modules["{missing}"] = None
from chatstream.engines.transformers import create_engine
from chatstream.errors import ConfigError
assert "torch" not in sys.modules or sys.modules["torch"] is None
try:
    create_engine("any")
except ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 'pip install "openchatstream[transformers]"' in result.stdout
