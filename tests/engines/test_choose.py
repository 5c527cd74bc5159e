"""`engine_for` returns the engine of a model, and applies or refuses every loading option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from chatstream import ChatStream, LoadSettings
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.choose import engine_for
from chatstream.engines.mock import MockEngine
from chatstream.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float16",
    "context_len": 64,
    "num_threads": 1,
    "prepack": "off",
    "cuda_graphs": "auto",
    "prefix_cache_bytes": 0,
    "trust_remote_code": True,
}


def test_every_loading_option_is_covered_here() -> None:
    assert SETTINGS.keys() == {field.name for field in fields(LoadSettings)}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_demo_model_refuses_every_loading_option(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs a model; the demo model has its own") as refused:
        engine_for(load=LoadSettings(**{name: SETTINGS[name]}))
    assert refused.value.param == name
    default = LoadSettings(dtype="auto", prepack="auto", device="auto", cuda_graphs="off")
    assert isinstance(engine_for(load=default, itl_target_s=0.1), StepEngine)


@pytest.mark.parametrize("name", [*SETTINGS, "model", "tokenizer"])
@pytest.mark.parametrize("own", [MockEngine(), None], ids=["own", "mock"])
def test_an_engine_that_loads_no_model_refuses_every_loading_option(name: str, own: MockEngine | None) -> None:
    mock: Any = {} if own else {"use_mock_response": True}
    with pytest.raises(ConfigError, match=f"{name} is for models") as refused:
        ChatStream(engine=own, **mock, **{name: SETTINGS.get(name, "any")})
    assert refused.value.param == name


@pytest.mark.parametrize(("name", "value"), [("engine", "torch"), ("engine_in", "cloud")])
def test_an_unknown_name_is_refused_with_the_known_names(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be one of .*, .*, not '{value}'") as refused:
        engine_for("any", **{name: value})  # type: ignore[arg-type]
    assert refused.value.param == name
