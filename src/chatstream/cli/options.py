"""Options common to `serve`, `chat` and `tune`: the model, its default sampling, and where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number

from chatstream.engines.choose import EngineIn
from chatstream.engines.loading.settings import LoadSettings
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.engines.base import Engine


def _whole_number(type_: Any, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


WHOLE_NUMBER = Parameter(converter=_whole_number)
"""For int options: by default cyclopts rounds 1.5 to 2."""


def _count_or_auto(type_: Any, tokens: Sequence[Token]) -> int | str:
    if tokens[0].value == "auto":
        return "auto"
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is neither a whole number nor auto") from None


COUNT_OR_AUTO = Parameter(converter=_count_or_auto)
ABOVE_ZERO = Parameter(validator=Number(gt=0))


MODEL_GROUP = Group("Model", sort_key=1)


@Parameter(name="*", group=MODEL_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The model, and defaults for what a request does not set."""

    engine: Literal["auto", "transformers", "openvino", "mock"] = "auto"
    """Engine that generates text. auto: openvino for an OpenVINO export, transformers for any other MODEL, the demo
    model without MODEL. mock: scripted text without a model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Data type of the weights. [default: auto, as in the checkpoint]"""
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    """Device that the model runs on. [default: auto, the best one available]"""
    context_len: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens of prompt and answer together, at most. [default: the model's limit, at most 8192]"""
    num_threads: Annotated[int | None, WHOLE_NUMBER] = None
    """CPU threads for the model; more threads than free cores make it several times slower. [default: the physical
    cores available to this process, less one from 4 up]"""
    prepack: Literal["auto", "on", "off"] | None = None
    """Reorder the weights for this CPU at load time. [default: auto, on if a short trial shows that it is faster]"""
    cuda_graphs: Literal["auto", "off"] | None = None
    """Capture of steps as CUDA graphs. auto: on if the model is on a GPU. [default: off, because it has not been run on
    a GPU yet]"""
    prefix_cache_mib: Annotated[int | None, WHOLE_NUMBER, Parameter(validator=Number(gte=0))] = None
    """Memory for the prefix cache in MiB: earlier turns, shared prompt prefixes and preempted requests; 0 disables it.
    [default: 15 % of the memory that is free after the model is loaded]"""
    max_new_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens of an answer, at most. [default: 1024 or a quarter of the context; mock: no limit]"""
    temperature: float | None = None
    """Sampling temperature, from 0 (always the likeliest token) to 2. [default: the checkpoint's]"""
    system_prompt: str | None = None
    """System message placed before every conversation. [default: none]"""
    mock_type: Literal["round", "long", "echo"] | None = None
    """With --engine mock: round (one sentence, the next for each turn), long (several paragraphs) or echo (the user's
    message). [default: round]"""
    mock_time_per_token: float | None = None
    """With --engine mock: seconds between two tokens. [default: 0.1]"""
    mock_initial_wait: float | None = None
    """With --engine mock: seconds before the first token. [default: 0]"""

    def settings(self, model: str | None) -> dict[str, Any]:
        """Return keyword arguments for `ChatStream`. Raises `ConfigError` for options that exclude each other."""
        common = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "system_prompt")}
        if self.engine == "mock":
            if model is not None:
                raise ConfigError(f"--engine mock takes no MODEL, but {model!r} was given; leave out one of them")
            self.refuse(*LOADING, because="has no effect with --engine mock")
            return common | {"engine": self._mock_engine()}
        self.refuse("mock_type", "mock_time_per_token", "mock_initial_wait", because="needs --engine mock")
        if model is None:
            if self.engine == "transformers":
                raise ConfigError("--engine transformers needs a MODEL: a Hugging Face name or a checkpoint directory")
            if self.engine == "openvino":
                raise ConfigError("--engine openvino needs a MODEL: the directory of an OpenVINO export")
            self.refuse(*LOADING, because="needs a MODEL; it cannot be set for the demo model")
        if model is not None:
            _check_path(model)
            common["engine"] = self.engine
        return common | {"model": model, "load": self._load_settings()}

    def refuse(self, *names: str, because: str) -> None:
        """Raise `ConfigError` for the first of these options that was given."""
        defaults = ModelOptions()
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise ConfigError(f"{option(name)} {because}")

    def refuse_all_but(self, *names: str, because: str) -> None:
        self.refuse(*(field.name for field in fields(self) if field.name not in names), because=because)

    def _load_settings(self) -> LoadSettings:
        given = {name: getattr(self, name) for name in LOADING if getattr(self, name) is not None}
        mib = given.pop("prefix_cache_mib", None)
        return LoadSettings(**given) if mib is None else LoadSettings(**given, prefix_cache_bytes=mib * 2**20)

    def _mock_engine(self) -> Engine:
        from chatstream.engines.mock import MockEngine

        given: dict[str, Any] = {
            "type": self.mock_type,
            "time_per_token_s": self.mock_time_per_token,
            "initial_wait_s": self.mock_initial_wait,
        }
        return MockEngine(**{name: value for name, value in given.items() if value is not None})


LOADING = (
    *(field.name for field in fields(ModelOptions) if field.name in LoadSettings.__dataclass_fields__),
    "prefix_cache_mib",
)
"""Options that set a field of `LoadSettings`: those with the field's name, and one in another unit."""


@Parameter(name="*", group=MODEL_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelOptions(ModelOptions):
    """The model of a server, which may run in a child process."""

    engine_in: EngineIn = "process"
    """Where the model runs. process: in a child process, which is replaced when it dies or hangs. thread: in a thread
    of this process, as the mock always does."""

    def settings(self, model: str | None) -> dict[str, Any]:
        settings = ModelOptions.settings(self, model)
        return settings if self.engine == "mock" else settings | {"engine_in": self.engine_in}


def _check_path(model: str) -> None:
    """Check a directory before the model libraries are imported, which takes seconds. Raises `ConfigError`."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"there is no config.json in {model}; MODEL is a checkpoint directory or a Hugging Face name")
    if not path.is_dir() and model.startswith((".", "/", "~")):
        raise ConfigError(f"no such directory: {model}; MODEL is a checkpoint directory or a Hugging Face name")


DEFAULT_MODEL = ModelOptions()
DEFAULT_SERVED_MODEL = ServedModelOptions()


def option(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")
