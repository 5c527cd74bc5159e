"""From what a user names — nothing, a model's name, a model object — to an engine. Imports only the one it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from chatstream.checks import check_choice
from chatstream.engines.base import Engine
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
    *,
    device: Any = None,
    dtype: str = "auto",
    context_len: int | None = None,
    num_threads: int | None = None,
    prepack: str = "auto",
    cuda_graphs: str = "auto",
    prefix_cache_bytes: int | None = None,
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
    given = only_given(
        device=device,
        dtype=dtype,
        context_len=context_len,
        num_threads=num_threads,
        prepack=prepack,
        cuda_graphs=cuda_graphs,
        prefix_cache_bytes=prefix_cache_bytes,
    )
    if engine == "openvino" or (engine == "auto" and isinstance(model, str) and _is_for_openvino(Path(model))):
        if itl_target_s is not None:
            logger.warning("itl_target_s bounds no prompts in the OpenVINO engine: its step_tokens do")
        return _in_process(_openvino_maker(model, tokenizer, **given), heartbeat_timeout_s=SILENT_STEP_TIMEOUT_S)
    make = partial(_maker(model, tokenizer, **given), itl_target_s=itl_target_s)
    if engine_in == "thread":
        return make()
    if model is not None and not isinstance(model, str):
        raise ConfigError(
            "a loaded model stays in its process: give its name or directory, or engine_in='thread'", param="engine_in"
        )
    return _in_process(make)


def only_given(**settings: Any) -> dict[str, Any]:
    """Of how a model is loaded what was said: "auto" and None say nothing."""
    return {name: value for name, value in settings.items() if value not in (None, "auto")}


def _in_process(make: Callable[[], Engine], **options: Any) -> Engine:
    from chatstream.engines.process import ProcessEngine

    return ProcessEngine(make, **options)


def _is_for_openvino(directory: Path) -> bool:
    """Whether it holds a model for OpenVINO and nothing that transformers could load."""
    from chatstream.engines import openvino

    return openvino.is_exported(directory) and not any(directory.glob("*.safetensors"))


def _openvino_maker(
    model: Any, tokenizer: Any, *, device: Any = "cpu", prefix_cache_bytes: int | None = None, **given: Any
) -> Callable[[], Engine]:
    if not isinstance(model, str):
        raise ConfigError("the OpenVINO engine needs the directory of an exported model", param="engine")
    if tokenizer is not None:
        raise ConfigError("the OpenVINO engine takes the tokenizer that lies beside the model", param="tokenizer")
    if device != "cpu":
        raise ConfigError(f"the OpenVINO engine computes on the CPU, not on {device}", param="device")
    if "prepack" in given:
        raise ConfigError("the OpenVINO engine arranges its weights itself", param="prepack")
    if "cuda_graphs" in given:
        raise ConfigError("the OpenVINO engine captures no CUDA graphs", param="cuda_graphs")
    if prefix_cache_bytes:
        raise ConfigError(
            "the OpenVINO engine keeps earlier turns in what kv_memory_gib leaves: prefix_cache_bytes can only be 0, "
            "which turns that off",
            param="prefix_cache_bytes",
        )
    from chatstream.engines import openvino

    return partial(openvino.create_engine, model, prefix_caching=prefix_cache_bytes is None, **given)


def _maker(model: Any, tokenizer: Any, **given: Any) -> Callable[..., Engine]:
    """What makes the engine, by name: so it can be made in another process too."""
    if model is None:
        for name in given:
            raise ConfigError(f"{name} needs a model; the demo model has its own", param=name)
        if tokenizer is not None:
            raise ConfigError("a tokenizer without a model; give both, or none for the demo model", param="tokenizer")
        from chatstream.engines import demo

        return demo.create_engine
    from chatstream.engines import transformers

    return partial(transformers.create_engine, model, tokenizer, **given)
