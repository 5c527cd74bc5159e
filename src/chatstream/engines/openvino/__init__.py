"""Models exported to OpenVINO's format, run on a CPU with the continuous batching of OpenVINO GenAI.

    from chatstream.engines.openvino import create_engine

    engine = create_engine("./qwen-int8")

    engine.py     the engine and its loop of steps
    pipeline.py   the library's pipeline           loader.py     a directory to a running pipeline
    codec.py      text to tokens and back          settings.py   loading options

Needs `pip install "openchatstream[openvino]"`, and neither torch nor transformers; importing this package does not.
docs/openvino.md describes the export of a model and the behaviour of the library.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatstream.engines.openvino.engine import OpenVINOEngine
from chatstream.engines.openvino.settings import MODEL_FILE, OpenVINOSettings
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.engines.openvino.loader import Loaded

__all__ = ["create_engine"]


def create_engine(directory: str | Path, *, model_name: str | None = None, **settings: Any) -> OpenVINOEngine:
    """An engine for a directory that `optimum-cli export openvino` has written.

    `settings` are those of `OpenVINOSettings`. `model_name` is the name that clients request, by default the
    directory's last component. A step keeps Python's lock until it ends, and after a failed step the engine stays
    unavailable. Where other threads must run, for example to answer `/health`, or where the service must recover, wrap
    the engine: `ProcessEngine(partial(create_engine, "./qwen-int8"))`. `serve` and `ChatStream` do.

    Raises `ConfigError` for impossible settings, if OpenVINO GenAI is not installed, and if the directory holds no
    exported model. `engine.start()` loads the model and raises what is wrong with it.
    """
    if find_spec("openvino_genai") is None:
        raise ConfigError(
            'this engine needs openvino-genai: pip install "openchatstream[openvino]"; '
            'in a clone: pip install -e ".[openvino]"'
        )
    checked = OpenVINOSettings(**settings)
    path = Path(directory)
    if not is_exported(path):
        raise ConfigError(
            f"there is no {MODEL_FILE} in {path}; the OpenVINO engine takes a directory that "
            "optimum-cli export openvino has written"
        )
    return OpenVINOEngine(model_name or path.resolve().name, partial(_load, path, checked))


def is_exported(directory: Path) -> bool:
    """Whether the directory holds an exported language model."""
    return (directory / MODEL_FILE).is_file()


def _load(directory: Path, settings: OpenVINOSettings) -> Loaded:
    # The import takes seconds, so it waits for the engine's start: a server opens its port first.
    from chatstream.engines.openvino import loader

    return loader.load(directory, settings)
