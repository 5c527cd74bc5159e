"""Loading: from a directory and settings to a running pipeline, or to one line that states what is wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loky
import pytest

from chatstream.engines import openvino
from chatstream.engines.choose import engine_for
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.openvino import create_engine, loader
from chatstream.engines.openvino.engine import OpenVINOEngine
from chatstream.engines.openvino.loader import load
from chatstream.engines.openvino.settings import OpenVINOSettings
from chatstream.engines.process import ProcessEngine
from chatstream.errors import ConfigError
from tests.engines.openvino.recording import CONTEXT_GIB, CONTEXT_LEN, TINY
from tests.engines.openvino.test_engine import copy_of_tiny

pytestmark = pytest.mark.anyio

# --- which engine -------------------------------------------------------------------------------------------------


def test_an_exported_model_is_detected_and_runs_in_a_child_process() -> None:
    """A step of the library holds Python's lock: in a thread it would block the event loop."""
    for engine in (engine_for(str(TINY)), engine_for(str(TINY), engine="openvino", engine_in="thread")):
        assert isinstance(engine, ProcessEngine)
        assert engine.model_name == "tiny"
    assert isinstance(create_engine(TINY), OpenVINOEngine)


def test_a_directory_with_both_formats_uses_transformers_unless_openvino_is_named(tmp_path: Path) -> None:
    (copy_of_tiny(tmp_path) / "model.safetensors").touch()
    assert not isinstance(engine_for(str(tmp_path)), ProcessEngine)
    assert isinstance(engine_for(str(tmp_path), engine="openvino"), ProcessEngine)


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        ("Qwen/Qwen3-0.6B", None, "there is no openvino_model.xml in Qwen/Qwen3-0.6B"),
        (None, None, "the OpenVINO engine needs the directory of an exported model"),
        (str(TINY), object(), "uses the tokenizer in the model's directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_arguments_are_refused_before_loading(model: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_for(model, tokenizer, engine="openvino")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (LoadSettings(device="cuda"), "the OpenVINO engine computes on the CPU, not on cuda"),
        (LoadSettings(dtype="float16"), "dtype must be one of auto, float32, bfloat16"),
        (LoadSettings(prepack="off"), "the OpenVINO engine does not support prepack"),
        (LoadSettings(cuda_graphs="auto"), "the OpenVINO engine does not support cuda_graphs"),
        (LoadSettings(trust_remote_code=True), "the OpenVINO engine does not support trust_remote_code"),
        (LoadSettings(prefix_cache_bytes=2**20), "prefix_cache_bytes can only be 0, which disables that cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_unsupported_loading_option_is_refused_by_name(load: LoadSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        engine_for(str(TINY), load=load)
    assert [refused.value.param] == [*load.non_defaults()]


@pytest.mark.parametrize(("prefix_cache_bytes", "is_caching"), [(None, True), (0, False)])
def test_a_prefix_cache_of_0_bytes_turns_prefix_caching_off(
    prefix_cache_bytes: int | None, is_caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used_settings: dict[str, Any] = {}

    def create(directory: str, **settings: Any) -> OpenVINOEngine:
        used_settings.update(settings)
        return create_engine(directory, **settings)

    monkeypatch.setattr(openvino, "create_engine", create)
    monkeypatch.setattr(ProcessEngine, "__init__", lambda self, recipe, **options: recipe() and None)
    load = LoadSettings(device="cpu", num_threads=2, prefix_cache_bytes=prefix_cache_bytes)
    engine_for(str(TINY), load=load)
    assert used_settings == load.non_defaults()
    assert OpenVINOSettings(**used_settings).prefix_caching is is_caching


def test_an_itl_target_that_has_no_effect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine_for(str(TINY), itl_target_s=0.05)
    assert "itl_target_s has no effect on the OpenVINO engine; its step_tokens bounds a step" in caplog.text


def test_a_missing_package_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "chatstream.engines.openvino.find_spec", lambda name: None if name == "openvino_genai" else find(name)
    )
    with pytest.raises(ConfigError, match=r'pip install "openchatstream\[openvino\]"'):
        create_engine(TINY)


@pytest.mark.parametrize(
    ("name", "value"), [("step_tokens", 1), ("num_threads", 0), ("kv_memory_gib", 0), ("kv_memory_gib", float("nan"))]
)
def test_impossible_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name) as refused:
        create_engine(TINY, **{name: value})
    assert refused.value.param == name


# --- broken exports -----------------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text, "utf-8")


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        text = (directory / name).read_text("utf-8")
        assert old in text
        (directory / name).write_text(text.replace(old, new), "utf-8")

    return change


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights are missing": (remove("openvino_model.bin"), "bin file cannot be found"),
    "weights are cut off": (write("openvino_model.bin", "short"), "Incorrect weights in bin file"),
    "the network is cut off": (write("openvino_model.xml", "<net"), "Unable to read the model"),
    "no keys and values are kept": (
        edit("openvino_model.xml", 'variable_shape="?,1,?,8"', 'variable_shape="?,8"'),
        "cannot load",
    ),
    "the tokenizer is missing": (remove("tokenizer.json"), "there is no tokenizer.json in"),
    "the tokenizer is broken": (write("tokenizer.json", "{}"), "cannot read .*tokenizer.json"),
    "the configuration is no JSON": (write("config.json", "{"), "config.json is not JSON"),
    "the configuration is a list": (write("generation_config.json", "[]"), "is not a JSON object"),
    "the template is broken": (write("chat_template.jinja", "{% if %}"), "the chat template is broken in line 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_export_is_reported_in_one_line(name: str, tmp_path: Path) -> None:
    breaking, message = BROKEN[name]
    breaking(copy_of_tiny(tmp_path))
    with pytest.raises(ConfigError, match=message) as refused:
        load(tmp_path, OpenVINOSettings(kv_memory_gib=0.01))
    assert "\n" not in refused.value.message


async def test_start_raises_the_error_and_health_reports_it(tmp_path: Path) -> None:
    (copy_of_tiny(tmp_path) / "openvino_model.bin").unlink()
    engine = create_engine(tmp_path)
    with pytest.raises(ConfigError, match="bin file cannot be found"):
        await engine.start()
    assert "bin file cannot be found" in engine.health().detail
    await engine.stop()


def test_an_export_without_configuration_files_loads(tmp_path: Path) -> None:
    copy_of_tiny(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    loaded = load(tmp_path, OpenVINOSettings(kv_memory_gib=0.1, context_len=64))
    assert loaded.context_len == 64
    assert loaded.codec.eos_token_ids == frozenset()


# --- memory and context -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_concurrency_is_the_number_of_whole_contexts_that_fit_the_memory(dtype: str) -> None:
    contexts_gib = CONTEXT_GIB * (0.5 if dtype == "bfloat16" else 1.0)
    loaded = load(TINY, OpenVINOSettings(dtype=dtype, kv_memory_gib=7.9 * contexts_gib))
    assert loaded.max_concurrency == 7
    assert loaded.pipeline.cache_bytes == 7 * round(contexts_gib * 2**30)


def test_max_concurrency_is_at_most_half_of_step_tokens() -> None:
    assert load(TINY, OpenVINOSettings(step_tokens=10)).max_concurrency == 5


def test_a_context_that_does_not_fit_the_memory_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=f"one context of {CONTEXT_LEN} tokens take .* MiB, but only .* MiB are reserved"
    ):
        load(TINY, OpenVINOSettings(dtype="float32", kv_memory_gib=0.9 * CONTEXT_GIB))
    monkeypatch.setattr(loader, "free_host_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="choose a smaller context_len or a larger kv_memory_gib"):
        load(TINY, OpenVINOSettings())


def test_keys_and_values_get_a_quarter_of_the_memory_free_beyond_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (TINY / "openvino_model.bin").stat().st_size
    monkeypatch.setattr(loader, "free_host_bytes", lambda: weights + int(4 * 7.9 * CONTEXT_GIB * 2**30))
    assert load(TINY, OpenVINOSettings(dtype="float32")).max_concurrency == 7


@pytest.mark.parametrize(("wanted", "expected"), [(None, 7), (2, 2)])
def test_the_library_gets_the_chosen_number_of_threads(
    wanted: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loky, "cpu_count", lambda only_physical_cores=False: 8)
    passed: dict[str, object] = {}
    original = loader.Pipeline

    def pipeline(*args: Any, properties: dict[str, object], **options: Any) -> Any:
        passed.update(properties)
        return original(*args, properties=properties, **options)

    monkeypatch.setattr(loader, "Pipeline", pipeline)
    load(TINY, OpenVINOSettings(num_threads=wanted))
    assert passed == {"INFERENCE_NUM_THREADS": expected, "sampler_num_threads": expected}


@pytest.mark.parametrize(("wanted", "context_len"), [(None, CONTEXT_LEN), (20, 20), (CONTEXT_LEN, CONTEXT_LEN)])
def test_the_context_is_the_models_own_or_shorter(wanted: int | None, context_len: int) -> None:
    assert load(TINY, OpenVINOSettings(context_len=wanted)).context_len == context_len


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_len 161 is more than the model's 160 tokens"):
        load(TINY, OpenVINOSettings(context_len=161))


def test_a_context_without_a_known_limit_is_bounded(tmp_path: Path) -> None:
    edit("config.json", '"max_position_embeddings": 160', '"max_position_embeddings": 1000000')(copy_of_tiny(tmp_path))
    assert load(tmp_path, OpenVINOSettings()).context_len == 8192
