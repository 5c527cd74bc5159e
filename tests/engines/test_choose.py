"""What is named becomes an engine, and what was said about it counts or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from chatstream.config import make_engine
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.choose import engine_for
from chatstream.engines.mock import MockEngine
from chatstream.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "int3",
    "context_len": -5,
    "num_threads": -1,
    "prepack": "maybe",
    "cuda_graphs": "maybe",
    "prefix_cache_bytes": 0,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_demo_model_takes_no_setting_of_another_and_does_not_drop_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs a model; the demo model has its own") as refused:
        engine_for(None, **{name: SETTINGS[name]})
    assert refused.value.param == name
    assert isinstance(engine_for(None, dtype="auto", prepack="auto", device="auto", itl_target_s=0.1), StepEngine)


@pytest.mark.parametrize("name", [*SETTINGS, "model", "tokenizer"])
@pytest.mark.parametrize("own", [MockEngine(), None], ids=["own", "mock"])
def test_nor_does_an_engine_that_loads_nothing(name: str, own: MockEngine | None) -> None:
    given = {"model": None, "tokenizer": None, name: SETTINGS.get(name, "any")}
    with pytest.raises(ConfigError, match=f"{name} is for models") as refused:
        make_engine(
            own, **given, engine_in="thread", use_mock_response=own is None, mock_params=None, itl_target_s=None
        )
    assert refused.value.param == name


@pytest.mark.parametrize(("name", "value"), [("engine", "torch"), ("engine_in", "cloud")])
def test_a_name_that_nobody_has_is_refused_with_those_there_are(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be one of .*, .*, not '{value}'") as refused:
        engine_for("any", **{name: value})  # type: ignore[arg-type]
    assert refused.value.param == name
