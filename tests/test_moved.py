"""Imports of modules by their old paths keep working, with a warning."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module, reload
from pathlib import Path

import pytest

import chatstream
from chatstream.moved import MOVED


@pytest.fixture
def _forgotten() -> None:
    """Each test imports the old paths for the first time."""
    for old in MOVED:
        sys.modules.pop(old, None)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=MOVED)
def test_an_old_path_gives_the_names_of_the_new_one_and_a_warning(old: str, new: str) -> None:
    target = import_module(new)
    own = {name for name, thing in vars(target).items() if getattr(thing, "__module__", None) == new}
    assert own
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = import_module(old)
    assert all(getattr(module, name) is getattr(target, name) for name in own)


@pytest.mark.usefixtures("_forgotten")
def test_a_moved_name_is_imported_as_before() -> None:
    program = "from chatstream.engines.step_engine import StepEngine; print(StepEngine.__module__)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "chatstream.engines.batching.engine\n"
    assert "DeprecationWarning: chatstream.engines.step_engine is now chatstream.engines.batching.engine" in done.stderr


def test_the_package_itself_uses_the_new_paths() -> None:
    source = Path(chatstream.__file__).parent
    files = [file for file in source.rglob("*.py") if file.name != "moved.py"]
    imported = {line.split()[1] for file in files for line in file.read_text().splitlines() if line.startswith("from ")}
    assert "chatstream.engines.base" in imported
    assert imported & set(MOVED) == set()


def test_the_old_module_of_the_limits_is_importable() -> None:
    assert import_module("chatstream.scheduler.limits").FixedLimit(2).value == 2


def test_an_unknown_path_is_still_an_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("chatstream.engines.nothing")


def test_loading_the_package_again_adds_no_second_finder() -> None:
    before = len(sys.meta_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reload(chatstream)
    assert len(sys.meta_path) == before
