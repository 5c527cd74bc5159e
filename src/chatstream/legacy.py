"""Compatibility with ChatStream 0.3: names of settings, and the finish token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from chatstream.errors import ConfigError

FINISH_TOKEN = "<::EOS::>"
"""Ends every piece of text in the wire format of ChatStream 0.3, and of `ChatStream.handle_console_input`."""

REMOVED_SETTINGS = {
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
    "too_many_request_as_http_error": "a rejection is always a real 429",
}
"""Removed settings of ChatStream 0.3, and the replacement of each."""

_MOCK_PARAMS = {"type": "type", "initial_wait_sec": "initial_wait_s", "time_per_token_sec": "time_per_token_s"}


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises `ConfigError` that names the first of `names`, and its replacement if ChatStream 0.3 had that setting."""
    for name in names:
        instead = REMOVED_SETTINGS.get(name)
        raise ConfigError(
            f"{name} is no longer a setting: {instead}" if instead else f"unknown setting {name}", param=name
        )


def concurrency_limit(max_concurrency: Any, num_of_concurrent_executions: Any) -> Any:
    """The limit under either name, None if neither is given. Raises `ConfigError` if both are."""
    if max_concurrency is not None and num_of_concurrent_executions is not None:
        raise ConfigError(
            "max_concurrency and num_of_concurrent_executions mean the same: give one", param="max_concurrency"
        )
    return num_of_concurrent_executions if max_concurrency is None else max_concurrency


def mock_settings(mock_params: Mapping[str, Any]) -> dict[str, Any]:
    """`mock_params` as arguments of `MockEngine`. Raises `ConfigError` for an unknown name."""
    wrong = [str(name) for name in mock_params if name not in _MOCK_PARAMS]
    if wrong:
        known = ", ".join(_MOCK_PARAMS)
        raise ConfigError(f"unknown mock_params: {', '.join(wrong)}; known: {known}", param="mock_params")
    return {_MOCK_PARAMS[name]: value for name, value in mock_params.items()}
