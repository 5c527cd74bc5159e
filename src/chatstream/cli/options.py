"""Options that `serve`, `chat` and `tune` have in common: which model, how it answers, and where it runs."""

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
"""For ints: left to itself cyclopts rounds 1.5 to 2."""


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
    """Which model, and how it answers where a request does not say."""

    engine: Literal["auto", "transformers", "openvino", "mock"] = "auto"
    """What generates. auto: openvino for a MODEL exported to its format, transformers for any other, the demo model
    without one. mock: scripted text, no model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Type of the weights. [default: auto, the checkpoint's own]"""
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    """Where the model computes. [default: auto, the best there is]"""
    context_len: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens of prompt and answer together. [default: what the model allows, at most 8192]"""
    num_threads: Annotated[int | None, WHOLE_NUMBER] = None
    """CPU threads of the model; more than there are free cores makes it several times slower. [default: the physical
    cores that this process may use, less one from 4 up]"""
    prepack: Literal["auto", "on", "off"] | None = None
    """Reorder the weights for this CPU while loading. [default: auto, where a short trial shows that it is faster]"""
    cuda_graphs: Literal["auto", "off"] | None = None
    """auto: capture steps as CUDA graphs where the model is on a GPU. [default: off, because they have not been run on
    a GPU yet]"""
    prefix_cache_mib: Annotated[int | None, WHOLE_NUMBER, Parameter(validator=Number(gte=0))] = None
    """Memory for what was computed of earlier turns, shared beginnings and paused answers, in MiB; 0: nothing is kept
    or shared. [default: 15 % of what is free once the model is loaded]"""
    max_new_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Length of an answer in tokens, at most. [default: 1024 or a quarter of the context; mock: no limit]"""
    temperature: float | None = None
    """How freely tokens are chosen, from 0 (always the likeliest) to 2. [default: the checkpoint's own]"""
    system_prompt: str | None = None
    """Instructions that stand before every conversation."""
    mock_type: Literal["round", "long", "echo"] | None = None
    """With --engine mock: one sentence by turn, several paragraphs, or what was said. [default: round]"""
    mock_time_per_token: float | None = None
    """With --engine mock: seconds between two tokens. [default: 0.1]"""
    mock_initial_wait: float | None = None
    """With --engine mock: seconds before the first token. [default: 0]"""

    def settings(self, model: str | None) -> dict[str, Any]:
        """Keyword arguments of `ChatStream`. Raises `ConfigError` for options that do not go together."""
        common = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "system_prompt")}
        if self.engine == "mock":
            if model is not None:
                raise ConfigError(f"--engine mock takes no MODEL, but {model!r} was given; leave out one of them")
            self.refuse(*LOADING, because="has no meaning with --engine mock")
            return common | {"engine": self._mock_engine()}
        self.refuse("mock_type", "mock_time_per_token", "mock_initial_wait", because="needs --engine mock")
        if model is None:
            if self.engine == "transformers":
                raise ConfigError("--engine transformers needs a MODEL: a Hugging Face name or a checkpoint directory")
            if self.engine == "openvino":
                raise ConfigError("--engine openvino needs a MODEL: the directory of an exported one")
            self.refuse(*LOADING, because="needs a MODEL; the demo model has its own")
        if model is not None:
            _check_path(model)
            common["engine"] = self.engine
        return common | {"model": model, "load": self._load_settings()}

    def refuse(self, *names: str, because: str) -> None:
        """Raises `ConfigError` for the first of these options that was given."""
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
"""Options that set a field of `LoadSettings`: those with its name, and one in another unit."""


@Parameter(name="*", group=MODEL_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelOptions(ModelOptions):
    """As a server runs it."""

    engine_in: EngineIn = "process"
    """process: the model has a process of its own, and a new one when that dies or hangs. thread: a thread of
    the command's own process, where the mock always is."""

    def settings(self, model: str | None) -> dict[str, Any]:
        settings = ModelOptions.settings(self, model)
        return settings if self.engine == "mock" else settings | {"engine_in": self.engine_in}


def _check_path(model: str) -> None:
    """What can be said about a directory before the libraries that read it are loaded, which takes seconds."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"there is no config.json in {model}; MODEL is a checkpoint directory or a Hugging Face name")
    if not path.is_dir() and model.startswith((".", "/", "~")):
        raise ConfigError(f"no such directory: {model}; MODEL is a checkpoint directory or a Hugging Face name")


DEFAULT_MODEL = ModelOptions()
DEFAULT_SERVED_MODEL = ServedModelOptions()


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")
