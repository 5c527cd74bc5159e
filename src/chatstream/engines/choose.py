"""From what a user names — nothing, a model's name, a model object — to an engine. Imports only the one it needs."""

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

SILENT_STEP_TIMEOUT_S = 120.0
"""In place of the process's own 30: a step of OpenVINO holds Python's lock, so the child is as silent as if it hung for
as long as it reads a piece of a prompt, which takes tens of seconds where a model is large and the machine is small."""


def engine_for(
    model: Any = None,
    tokenizer: Any = None,
    load: LoadSettings | None = None,
    *,
    itl_target_s: float | None = None,
    engine: EngineName = "auto",
    engine_in: EngineIn = "thread",
) -> Engine:
    """The bundled demo model when `model` is None; else the OpenVINO engine for what was exported to OpenVINO's format,
    and the Transformers engine for everything else, unless `engine` names one of them.

    `model` is a Hugging Face name, a local directory, or a loaded model (then with its `tokenizer`). Nothing is loaded
    from disk or network before `Engine.start`. It runs in a thread of this process, or in a process of its own, which
    is watched and started anew when it dies. OpenVINO has a process of its own always: its steps hold Python's lock.
    Raises `ConfigError`.
    """
    check_choice("engine", engine, get_args(EngineName))
    check_choice("engine_in", engine_in, get_args(EngineIn))
    load = load or LoadSettings()
    if engine == "openvino" or (engine == "auto" and isinstance(model, str) and _is_for_openvino(Path(model))):
        if itl_target_s is not None:
            logger.warning("itl_target_s bounds no prompts in the OpenVINO engine: its step_tokens do")
        return _in_process(_openvino_maker(model, tokenizer, load), heartbeat_timeout_s=SILENT_STEP_TIMEOUT_S)
    make = partial(_maker(model, tokenizer, load), itl_target_s=itl_target_s)
    if engine_in == "thread":
        return make()
    if model is not None and not isinstance(model, str):
        raise ConfigError(
            "a loaded model stays in its process: give its name or directory, or engine_in='thread'", param="engine_in"
        )
    return _in_process(make)


def _in_process(make: Callable[[], Engine], **options: Any) -> Engine:
    from chatstream.engines.process import ProcessEngine

    return ProcessEngine(make, **options)


def _is_for_openvino(directory: Path) -> bool:
    """Whether it holds a model for OpenVINO and nothing that transformers could load."""
    from chatstream.engines import openvino

    return openvino.is_exported(directory) and not any(directory.glob("*.safetensors"))


def _openvino_maker(model: Any, tokenizer: Any, load: LoadSettings) -> Callable[[], Engine]:
    if not isinstance(model, str):
        raise ConfigError("the OpenVINO engine needs the directory of an exported model", param="engine")
    if tokenizer is not None:
        raise ConfigError("the OpenVINO engine takes the tokenizer that lies beside the model", param="tokenizer")
    from chatstream.engines import openvino

    return partial(openvino.create_engine, model, **load.non_defaults())


def _maker(model: Any, tokenizer: Any, load: LoadSettings) -> Callable[..., Engine]:
    """What makes the engine, by name: so it can be made in another process too."""
    if model is None:
        for name in load.non_defaults():
            raise ConfigError(f"{name} needs a model; the demo model has its own", param=name)
        if tokenizer is not None:
            raise ConfigError("a tokenizer without a model; give both, or none for the demo model", param="tokenizer")
        from chatstream.engines import demo

        return demo.create_engine
    from chatstream.engines import transformers

    return partial(transformers.create_engine, model, tokenizer, load)
