"""Loading: sensible defaults, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
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
    BartConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RwkvConfig,
)

from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import DEFAULT_MAX_CONTEXT_LEN, LoadSettings, default_sampling, load
from chatstream.errors import ConfigError
from chatstream.types import SamplingParams
from tests.engines.transformers.checkpoints import CONTEXT_LEN
from tests.engines.transformers.recording import answer, greedy, request_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def copy_of(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own to damage; keyword arguments change its config.json."""

    def copy(kind: str = "llama", **config: Any) -> Path:
        path = tmp_path / "broken"
        shutil.copytree(checkpoint(kind), path)
        before = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(before | config))
        return path

    return copy


async def refusal_of(model: Any, *args: Any, **options: Any) -> str:
    """The one line that `start` refuses with."""
    engine = create_engine(model, *args, **options)
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert not engine.health().is_ready
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 450
    return caught.value.message


# --- what is wrong with a checkpoint ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/nothing"])
async def test_a_checkpoint_that_does_not_exist(name: str) -> None:
    assert f"cannot load {name}: " in await refusal_of(name)


async def test_an_empty_directory(tmp_path: Path) -> None:
    assert "Unrecognized model" in await refusal_of(str(tmp_path))


async def test_a_config_that_is_not_json(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "config.json").write_text("{")
    assert "config.json cannot be read" in await refusal_of(str(path))


async def test_a_model_type_newer_than_the_library(copy_of: Callable[..., Path]) -> None:
    assert "does not know this model type" in await refusal_of(str(copy_of(model_type="llama_of_tomorrow")))


async def test_weights_that_are_not_there(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    (path / "model.safetensors").unlink()
    assert "no file named" in await refusal_of(str(path))


async def test_weights_cut_off_in_the_middle(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot load" in await refusal_of(str(path))


async def test_some_weights_missing_are_not_replaced_by_random_ones(copy_of: Callable[..., Path]) -> None:
    assert "9 weights are missing, such as model.layers.2." in await refusal_of(str(copy_of(num_hidden_layers=3)))


async def test_an_encoder_decoder(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    assert "bart is an encoder-decoder" in await refusal_of(str(tmp_path))


async def test_a_model_that_generates_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "vit is not a causal language model" in await refusal_of(str(tmp_path))


async def test_a_model_whose_memory_the_engine_cannot_hold(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, context_length=32)
    )
    assert "RwkvForCausalLM keeps its memory of the text in a form" in await refusal_of(model, tokenizer)


async def test_a_tokenizer_without_files(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert f"cannot load the tokenizer of {path}: " in await refusal_of(str(path))


async def test_the_cause_is_kept_for_whoever_looks_deeper(copy_of: Callable[..., Path]) -> None:
    engine = create_engine(str(copy_of(model_type="llama_of_tomorrow")))
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert isinstance(caught.value.__cause__, ValueError)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be"),
        ({"device": "abacus"}, "device must be"),
        ({"context_len": 15}, "context_len must be at least 16"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_engine("any", **options)


async def test_more_context_than_the_model_has_is_refused(checkpoint: Callable[[str], Path]) -> None:
    message = await refusal_of(str(checkpoint("llama")), device="cpu", context_len=CONTEXT_LEN + 1)
    assert message == f"context_len {CONTEXT_LEN + 1} is more than the model's {CONTEXT_LEN} tokens"


async def test_a_device_that_is_not_there_is_refused(checkpoint: Callable[[str], Path]) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    assert await refusal_of(str(checkpoint("llama")), device=absent) == f"device {absent} is not available here"


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
def test_the_context_is_the_models_unless_less_is_asked_for(
    kind: str, wanted: int | None, expected: int, checkpoint: Callable[[str], Path]
) -> None:
    model = load(str(checkpoint(kind)), None, LoadSettings(device="cpu", context_len=wanted))
    assert model.runner.context_len == expected


def test_a_very_long_context_is_bounded_unless_it_is_asked_for(copy_of: Callable[..., Path]) -> None:
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
    engine = create_engine(str(tmp_path), dtype=wanted, device="cpu")
    await engine.start()
    text, _ = await answer(engine, request_of([50, 60, 70], greedy(10)))
    await engine.stop()
    assert text
    assert f"torch.{computed} on cpu" in caplog.text


def test_the_checkpoints_recommendations_are_the_default_sampling(checkpoint: Callable[[str], Path]) -> None:
    model = load(str(checkpoint("llama")), None, LoadSettings(device="cpu"))
    assert model.default_sampling == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)


@pytest.mark.parametrize("said", [{}, {"top_k": 0}, {"temperature": 9.0}])
def test_recommendations_that_say_nothing_or_nonsense_leave_our_defaults(
    said: dict[str, float], reference: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference("qwen3")
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**said))
    assert default_sampling(model) == SamplingParams()


# --- names and models at hand -------------------------------------------------------------------------------------


def test_the_model_is_called_after_its_directory_or_its_name(checkpoint: Callable[[str], Path]) -> None:
    assert create_engine(str(checkpoint("llama"))).model_name == "llama"
    assert create_engine(f"{checkpoint('llama')}/").model_name == "llama"
    assert create_engine("Qwen/Qwen3-0.6B").model_name == "Qwen/Qwen3-0.6B"
    assert create_engine("Qwen/Qwen3-0.6B", model_name="mine").model_name == "mine"


async def test_a_loaded_model_is_served_as_it_is(
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
        create_engine(reference("llama"), tokenizer, dtype="float32")


# --- without torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_or_transformers_it_says_what_to_install(missing: str) -> None:
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
