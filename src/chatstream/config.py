"""From keyword arguments to settings and an engine. An argument without effect raises `ConfigError`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatstream.engines.base import Engine
from chatstream.engines.choose import EngineIn, EngineName, engine_for
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.mock import MockEngine
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.legacy import mock_settings, refuse_unknown
from chatstream.scheduler import SchedulerSettings
from chatstream.types import SamplingParams


def load_settings(load: LoadSettings | None, named: Mapping[str, Any]) -> LoadSettings:
    """`load` with the fields in `named` replaced where not None. Raises `ConfigError`, also for unknown names."""
    refuse_unknown([name for name in named if name not in LoadSettings.__dataclass_fields__])
    # A subclass has fields that only its own engine uses.
    if load is not None and type(load) is not LoadSettings:
        raise ConfigError(f"load must be a LoadSettings, not {type(load).__name__}", param="load")
    return replace(load or LoadSettings(), **_only_given(named))


def make_engine(
    engine: Engine | EngineName | None,
    model: Any,
    tokenizer: Any,
    load: LoadSettings,
    *,
    engine_in: EngineIn,
    use_mock_response: bool,
    mock_params: Mapping[str, Any] | None,
    itl_target_s: float | None,
) -> Engine:
    """Make the engine, or return the one given. Raises `ConfigError`, also for arguments that it does not use."""
    name: EngineName = "auto"
    if isinstance(engine, str):
        name, engine = engine, None
        if model is None:
            raise ConfigError(f"engine={name!r} needs a model", param="engine")
    if engine is None and not use_mock_response:
        return engine_for(model, tokenizer, load, engine=name, engine_in=engine_in, itl_target_s=itl_target_s)
    if engine_in == "process":
        raise ConfigError(
            "engine_in is for models; the mock and your own engine stay in this process", param="engine_in"
        )
    for given in _only_given({"model": model, "tokenizer": tokenizer}) | load.non_defaults():
        raise ConfigError(f"{given} is for models; the mock and your own engine do not use it", param=given)
    if engine is not None:
        return engine
    return MockEngine(**mock_settings(mock_params or {}))


def scheduler_settings(settings: SchedulerSettings | None, **given: Any) -> SchedulerSettings:
    """`settings` with the given fields replaced where not None. Raises `ConfigError`."""
    return replace(settings or SchedulerSettings(), **_only_given(given))


def sampling_defaults(**given: Any) -> dict[str, Any]:
    """The given sampling parameters, checked. Raises `ConfigError` that names the parameter."""
    try:
        return checked_sampling(_only_given(given))
    except InvalidRequest as error:
        raise ConfigError(error.message, param=error.param) from error


def checked_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams`; `stop` may be one string or a list. Raises `InvalidRequest` that names the field."""
    known = SamplingParams.__dataclass_fields__
    for name in given:
        if name not in known:
            raise InvalidRequest(f"unknown sampling parameter {name}", param=name)
    checked = dict(given)
    match checked.get("stop"):
        case str(stop):
            checked["stop"] = (stop,)
        case list(stops):
            checked["stop"] = tuple(stops)
    SamplingParams(**checked)
    return checked


def _only_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
