"""From keyword arguments to settings and an engine; the original's spelling is understood, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatstream.engines.base import Engine
from chatstream.engines.choose import EngineIn, EngineName, engine_for, only_given
from chatstream.engines.mock import MockEngine
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.scheduler import SchedulerSettings
from chatstream.scheduler.settings import Auto
from chatstream.types import SamplingParams

NO_LONGER = {
    "token_sampler": "sampling is set by temperature, top_k, top_p and repetition_penalty",
    "num_gpus": "the device is set by device",
    "chat_prompt_clazz": "prompts are made by the chat template of the tokenizer",
    "request_handler": "use engine=, sessions= or your own endpoint over stream()",
    "repetition_penalty_method": "the penalty is multiplicative, as in Hugging Face",
    "add_special_tokens": "the chat template decides about special tokens",
    "client_roles": "use api_keys and admin_key",
    "logger": "logs go to the logger named chatstream; configure that",
    "locale": "messages are English",
    "probe_mode_enabled": "use the mock engine",
    "too_many_request_as_http_error": "a refusal is always a real 429",
}
"""Settings of ChatStream 0.3, and what there is instead."""


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        instead = NO_LONGER.get(name)
        raise ConfigError(
            f"{name} is not a setting any more: {instead}" if instead else f"unknown setting {name}", param=name
        )


def make_engine(
    engine: Engine | EngineName | None,
    model: Any,
    tokenizer: Any,
    *,
    engine_in: EngineIn,
    use_mock_response: bool,
    mock_params: Mapping[str, Any] | None,
    itl_target_s: float | None,
    **loading: Any,
) -> Engine:
    """`loading`: how a model is loaded, as `engine_for` takes it. Raises `ConfigError`."""
    name: EngineName = "auto"
    if isinstance(engine, str):
        name, engine = engine, None
        if model is None:
            raise ConfigError(f"engine={name!r} needs a model", param="engine")
    if engine is None and not use_mock_response:
        return engine_for(model, tokenizer, engine=name, engine_in=engine_in, itl_target_s=itl_target_s, **loading)
    if engine_in == "process":
        raise ConfigError("engine_in is for models; the mock and your own engine run where they are", param="engine_in")
    for given in only_given(model=model, tokenizer=tokenizer, **loading):
        raise ConfigError(f"{given} is for models; the mock and your own engine have their own", param=given)
    if engine is not None:
        return engine
    names = {"type": "type", "initial_wait_sec": "initial_wait_s", "time_per_token_sec": "time_per_token_s"}
    params = mock_params or {}
    wrong = [str(name) for name in params if name not in names]
    if wrong:
        raise ConfigError(f"unknown mock_params: {', '.join(wrong)}; known: {', '.join(names)}", param="mock_params")
    return MockEngine(**{names[name]: value for name, value in params.items()})


def line_settings(settings: SchedulerSettings | None, **given: Any) -> SchedulerSettings:
    """What was given by itself comes before what was given as a whole. Raises `ConfigError`."""
    return replace(settings or SchedulerSettings(), **_only_given(given))


def sampling_defaults(**given: Any) -> dict[str, Any]:
    """Raises `ConfigError` that names the parameter."""
    try:
        return checked_sampling(_only_given(given))
    except InvalidRequest as error:
        raise ConfigError(error.message, param=error.param) from error


def one_of(max_concurrency: int | Auto | None, num_of_concurrent_executions: int | None) -> int | Auto | None:
    if max_concurrency is not None and num_of_concurrent_executions is not None:
        raise ConfigError(
            "max_concurrency and num_of_concurrent_executions mean the same: give one", param="max_concurrency"
        )
    return num_of_concurrent_executions if max_concurrency is None else max_concurrency


def checked_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams`, where `stop` may also be one string or a list. Raises `InvalidRequest` naming one."""
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
