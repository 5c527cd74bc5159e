"""Models exported to OpenVINO's format, generated for several clients at once on a CPU by OpenVINO GenAI.

    from chatstream.engines.openvino import create_engine

    engine = create_engine("./qwen-int8")

    engine.py     the engine: one thread, one step after the other
    pipeline.py   the library behind ints          loader.py     a directory to a running pipeline
    codec.py      text to tokens and back          settings.py   how it is loaded

Needs `pip install "openchatstream[openvino]"`, and neither torch nor transformers; importing this package does not.
docs/openvino.md tells how to export a model and what was found out about the library.
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
    """An engine over a directory that `optimum-cli export openvino` has written.

    `settings` are those of `OpenVINOSettings`. `model_name` is what clients ask for; by default the directory's last
    component. A step keeps Python's lock until it has ended, and after one that failed the engine is not ready any
    more. So where other threads have something to do, such as answering `/health`, and where the service should go on,
    wrap it: `ProcessEngine(partial(create_engine, "./qwen-int8"))`; `serve` and `ChatStream` do.

    Raises `ConfigError` for settings that cannot be right, when OpenVINO GenAI is not installed, and when this is no
    exported model. What is wrong inside is said by `engine.start()`, which loads it.
    """
    if find_spec("openvino_genai") is None:
        raise ConfigError('this engine needs openvino-genai: pip install "openchatstream[openvino]"')
    checked = OpenVINOSettings(**settings)
    path = Path(directory)
    if not is_exported(path):
        raise ConfigError(
            f"there is no {MODEL_FILE} in {path}; the OpenVINO engine takes a directory that "
            "optimum-cli export openvino has written"
        )
    return OpenVINOEngine(model_name or path.resolve().name, partial(_load, path, checked))


def is_exported(directory: Path) -> bool:
    """Whether an exported language model lies in the directory."""
    return (directory / MODEL_FILE).is_file()


def _load(directory: Path, settings: OpenVINOSettings) -> Loaded:
    # Takes seconds, so not before the engine starts: a server opens its port first.
    from chatstream.engines.openvino import loader

    return loader.load(directory, settings)
