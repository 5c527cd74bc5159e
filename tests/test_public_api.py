"""The public API: exported names are documented, typed and importable."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import pytest

import chatstream
import chatstream.testing

INDEX = Path(__file__).parent.parent / "docs" / "README.md"


def documented_names() -> set[str]:
    """First column of the table below "Public names"."""
    section = INDEX.read_text(encoding="utf-8").split("## Public names")[1]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_exported_names_are_the_documented_ones() -> None:
    assert set(chatstream.__all__) == documented_names()


def test_the_list_is_sorted_and_has_no_name_twice() -> None:
    assert chatstream.__all__ == sorted(set(chatstream.__all__))


@pytest.mark.parametrize("name", chatstream.__all__)
def test_every_name_resolves_to_something_of_that_name_with_a_docstring(name: str) -> None:
    thing = getattr(chatstream, name)
    assert thing.__name__ == name
    # Not the generated one: a dataclass without a docstring gets its signature instead.
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", chatstream.__all__)
def test_every_public_method_is_typed_and_documented(name: str) -> None:
    for method_name, method in public_functions(getattr(chatstream, name)):
        signature = inspect.signature(method)
        unnamed = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert unnamed == [], f"{name}.{method_name}"
        assert signature.return_annotation is not signature.empty, f"{name}.{method_name}"


def public_functions(kind: type) -> Iterator[tuple[str, object]]:
    """Public functions that are defined in this package, and `__init__`."""
    for name, member in inspect.getmembers(kind, inspect.isfunction):
        if member.__module__.startswith("chatstream") and (name == "__init__" or not name.startswith("_")):
            yield name, member


@pytest.mark.parametrize(
    "method", ["stream", "submit", "cancel", "drain", "stats", "set_limits", "observe", "requests"]
)
def test_every_main_method_of_chat_stream_has_a_docstring(method: str) -> None:
    assert inspect.getdoc(getattr(chatstream.ChatStream, method))


@pytest.mark.parametrize("name", [n for n in chatstream.__all__ if n.endswith("Settings") or n == "SamplingParams"])
def test_settings_are_frozen_and_take_keywords_only(name: str) -> None:
    kind = getattr(chatstream, name)
    assert kind.__dataclass_params__.frozen
    parameters = inspect.signature(kind).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    assert get_type_hints(kind)


def test_dir_shows_the_names_before_they_are_used() -> None:
    program = "import chatstream; print(*dir(chatstream))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()
    assert set(chatstream.__all__) <= set(shown)
    assert shown == sorted(shown)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ChatStreamPool'"):
        _ = chatstream.ChatStreamPool


def test_star_import_gives_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from chatstream import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(chatstream.__all__)


def test_the_package_is_marked_as_typed() -> None:
    assert files("chatstream").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", chatstream.testing.__all__)
def test_the_doubles_are_documented(name: str) -> None:
    assert getattr(chatstream.testing, name).__doc__
