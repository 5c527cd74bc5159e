"""From what a user names — nothing, a model's name, a model object — to an engine. Imports only the one it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from chatstream.engines.base import Engine
from chatstream.errors import ConfigError

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
    if engine_in not in get_args(EngineIn):
        raise ConfigError(f"engine_in must be thread or process, not {engine_in!r}", param="engine_in")
    if engine not in get_args(EngineName):
        raise ConfigError(f"engine must be one of {', '.join(get_args(EngineName))}; not {engine!r}", param="engine")
    if engine == "auto" and isinstance(model, str) and _is_exported(Path(model)):
        engine = "openvino"
    if engine == "openvino":
        if prepack == "on":
            raise ConfigError("the OpenVINO engine arranges its weights itself", param="prepack")
        if prefix_cache_bytes is not None:
            raise ConfigError("the OpenVINO engine has a cache of its own", param="prefix_cache_bytes")
        make = _openvino_maker(model, tokenizer, device, dtype=dtype, context_len=context_len, num_threads=num_threads)
        from chatstream.engines.process import ProcessEngine

        return ProcessEngine(make, heartbeat_timeout_s=SILENT_STEP_TIMEOUT_S)
    make = _maker(
        model,
        tokenizer,
        device=device or "auto",
        dtype=dtype,
        context_len=context_len,
        num_threads=num_threads,
        prepack=prepack,
        prefix_cache_bytes=prefix_cache_bytes,
        itl_target_s=itl_target_s,
    )
    if engine_in == "thread":
        return make()
    if model is not None and not isinstance(model, str):
        raise ConfigError(
            "a loaded model stays in its process: give its name or directory, or engine_in='thread'", param="engine_in"
        )
    from chatstream.engines.process import ProcessEngine

    return ProcessEngine(make)


def _is_exported(directory: Path) -> bool:
    """Whether it holds a model for OpenVINO and nothing that transformers could load."""
    return (directory / "openvino_model.xml").is_file() and not any(directory.glob("*.safetensors"))


def _openvino_maker(model: Any, tokenizer: Any, device: Any, **settings: Any) -> Callable[[], Engine]:
    if not isinstance(model, str):
        raise ConfigError("the OpenVINO engine needs the directory of an exported model", param="engine")
    if tokenizer is not None:
        raise ConfigError("the OpenVINO engine takes the tokenizer that lies beside the model", param="tokenizer")
    if device not in (None, "auto", "cpu"):
        raise ConfigError(f"the OpenVINO engine computes on the CPU, not on {device}", param="device")
    from chatstream.engines import openvino

    return partial(openvino.create_engine, model, **settings)


def _maker(model: Any, tokenizer: Any, itl_target_s: float | None, **settings: Any) -> Callable[[], Engine]:
    """What makes the engine, by name: so it can be made in another process too."""
    if model is None:
        if tokenizer is not None:
            raise ConfigError("a tokenizer without a model; give both, or none for the demo model", param="tokenizer")
        from chatstream.engines import demo

        return partial(demo.create_engine, itl_target_s=itl_target_s)
    from chatstream.engines import transformers

    return partial(transformers.create_engine, model, tokenizer, itl_target_s=itl_target_s, **settings)
