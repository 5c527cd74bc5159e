"""The settings of loading: validated by the constructor, with the same names for type checkers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from chatstream.engines.loading.settings import LoadKeywords, LoadSettings
from chatstream.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, not 'int8'"),
        ({"device": "abacus"}, "device must be one of auto, cpu, cuda, mps, not 'abacus'"),
        ({"context_len": 15}, "context_len must be a whole number, at least 16, not 15"),
        ({"context_len": "2048"}, "context_len must be a whole number, at least 16, not '2048'"),
        ({"num_threads": 0}, "num_threads must be a whole number, at least 1, not 0"),
        ({"num_threads": 1.5}, "num_threads must be a whole number, at least 1, not 1.5"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes must be a whole number, at least 0, not -1"),
        ({"prepack": "maybe"}, "prepack must be one of auto, on, off, not 'maybe'"),
        ({"cuda_graphs": "on"}, "cuda_graphs must be one of auto, off, not 'on'"),
        ({"trust_remote_code": "false"}, "trust_remote_code must be True or False, not 'false'"),
    ],
    ids=str,
)
def test_an_invalid_value_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LoadSettings(**wrong)
    assert refused.value.message == message
    assert [refused.value.param] == [*wrong]


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'prepak'"):
        LoadSettings(prepak="off")  # type: ignore[call-arg]


def test_non_defaults_omits_fields_with_their_defaults() -> None:
    assert LoadSettings(device="auto", num_threads=None).non_defaults() == {}
    assert LoadSettings(num_threads=1, prefix_cache_bytes=0).non_defaults() == {
        "num_threads": 1,
        "prefix_cache_bytes": 0,
    }


def test_auto_is_not_the_default_of_cuda_graphs() -> None:
    assert LoadSettings(cuda_graphs="auto").non_defaults() == {"cuda_graphs": "auto"}
    assert LoadSettings(cuda_graphs="off").non_defaults() == {}


def test_type_checkers_know_every_field_as_a_keyword() -> None:
    keywords, types = get_type_hints(LoadKeywords), get_type_hints(LoadSettings)
    assert keywords == {field.name: types[field.name] | None for field in fields(LoadSettings)}
