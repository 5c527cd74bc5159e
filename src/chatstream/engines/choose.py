"""Choose the engine for a model: none given, a name, a directory or a loaded object. Imports only the chosen engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from chatstream.checks import check_choice
from chatstream.engines.base import Engine
from chatstream.engines.loading.settings import LoadSettings
from chatstream.errors import ConfigError

logger = logging.getLogger(__name__)

EngineIn: TypeAlias = Literal["thread", "process"]
EngineName: TypeAlias = Literal["auto", "transformers", "openvino"]

OPENVINO_HEARTBEAT_TIMEOUT_S = 120.0
"""Replaces the default of 30 s. An OpenVINO step holds the GIL, so the child process sends no heartbeat during it; the
prefill part of a step takes tens of seconds for a large model on a small machine."""


def engine_for(
    model: Any = None,
    tokenizer: Any = None,
    load: LoadSettings | None = None,
    *,
    itl_target_s: float | None = None,
    engine: EngineName = "auto",
    engine_in: EngineIn = "thread",
) -> Engine:
    """Return the engine for `model`. Nothing is loaded from disk or network before `Engine.start`.

    `model` is a Hugging Face name, a local directory, or a loaded model together with its `tokenizer`. None is the
    bundled demo model. With engine="auto", a directory in OpenVINO's format gets the OpenVINO engine, and any other
    model the Transformers engine.

    engine_in="thread" runs the engine in a thread of this process, "process" in a child process that is restarted when
    it dies. OpenVINO always gets a child process, because its steps hold the GIL.

    Raises `ConfigError`.
    """
    check_choice("engine", engine, get_args(EngineName))
    check_choice("engine_in", engine_in, get_args(EngineIn))
    load = load or LoadSettings()
    if engine == "openvino" or (engine == "auto" and isinstance(model, str) and _is_for_openvino(Path(model))):
        if itl_target_s is not None:
            logger.warning("itl_target_s has no effect on the OpenVINO engine; its step_tokens bounds a step")
        return _in_process(_openvino_factory(model, tokenizer, load), heartbeat_timeout_s=OPENVINO_HEARTBEAT_TIMEOUT_S)
    make = partial(_engine_factory(model, tokenizer, load), itl_target_s=itl_target_s)
    if engine_in == "thread":
        return make()
    if model is not None and not isinstance(model, str):
        raise ConfigError(
            "a loaded model cannot move to a child process; give its name or directory, or engine_in='thread'",
            param="engine_in",
        )
    return _in_process(make)


def _in_process(make: Callable[[], Engine], **options: Any) -> Engine:
    from chatstream.engines.process import ProcessEngine

    return ProcessEngine(make, **options)


def _is_for_openvino(directory: Path) -> bool:
    """Whether the directory contains an OpenVINO model and no weights that transformers could load."""
    from chatstream.engines import openvino

    return openvino.is_exported(directory) and not any(directory.glob("*.safetensors"))


def _openvino_factory(model: Any, tokenizer: Any, load: LoadSettings) -> Callable[[], Engine]:
    if not isinstance(model, str):
        raise ConfigError("the OpenVINO engine needs the directory of an exported model", param="engine")
    if tokenizer is not None:
        raise ConfigError(
            "the OpenVINO engine uses the tokenizer in the model's directory; leave tokenizer out", param="tokenizer"
        )
    from chatstream.engines import openvino

    return partial(openvino.create_engine, model, **load.non_defaults())


def _engine_factory(model: Any, tokenizer: Any, load: LoadSettings) -> Callable[..., Engine]:
    """The constructor of the engine with its arguments. Picklable, so that a child process can call it."""
    if model is None:
        for name in load.non_defaults():
            raise ConfigError(f"{name} needs a model; the demo model has its own", param=name)
        if tokenizer is not None:
            raise ConfigError("tokenizer needs a model; give both, or neither for the demo model", param="tokenizer")
        from chatstream.engines import demo

        return demo.create_engine
    from chatstream.engines import transformers

    return partial(transformers.create_engine, model, tokenizer, load)
