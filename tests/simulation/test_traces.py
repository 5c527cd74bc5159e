"""Traces from files: the calls, and the error for the first invalid cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatstream.errors import ConfigError
from chatstream.simulation import Call, read_trace


def trace(folder: Path, text: str) -> Path:
    path = folder / "calls.csv"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_columns_and_lines_may_be_in_any_order(tmp_path: Path) -> None:
    text = "client, output_tokens, arrival_s, prompt_tokens\nb, 7, 2.5, 11\na, 5, 1, 10\n"
    assert read_trace(trace(tmp_path, text)) == [Call(0.0, 10, 5, "a"), Call(1.5, 11, 7, "b")]


def test_all_columns_are_read_and_empty_cells_take_defaults(tmp_path: Path) -> None:
    text = "\ufeffarrival_s,prompt_tokens,output_tokens,client,priority,max_wait_s\r\n0,1,2,a,-3,9.5\r\n1,1,2,,,\r\n"
    assert read_trace(trace(tmp_path, text)) == [Call(0.0, 1, 2, "a", -3, 9.5), Call(1.0, 1, 2)]


@pytest.mark.parametrize("origin_s", [0, 7, 1_760_000_000])
def test_the_origin_of_the_times_is_arbitrary(tmp_path: Path, origin_s: int) -> None:
    lines = [f"{origin_s + after},1,2\n" for after in (4, 0, 366 * 86400)]
    calls = read_trace(trace(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + "".join(lines)))
    assert [call.at_s for call in calls] == [0.0, 4.0, 366 * 86400.0]


HEAD = "arrival_s,prompt_tokens,output_tokens,client,priority,max_wait_s\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["line 1", "column arrival_s is missing"]),
        ("arrival_s,prompt_tokens\n", ["line 1", "column output_tokens is missing"]),
        ("arrival_s,prompt_tokens,output_tokens,user\n", ["line 1", "unknown column 'user'", "client"]),
        (
            "arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,1,2\n",
            ["line 1", "prompt_tokens appears more than once"],
        ),
        (HEAD, ["no calls"]),
        (HEAD + "0,1,1\nsoon,1,1\n", ["line 3", "column arrival_s", "'soon'", "number of seconds"]),
        (HEAD + "-1,1,1\n", ["line 2", "column arrival_s", "from 0"]),
        (HEAD + "nan,1,1\n", ["line 2", "column arrival_s"]),
        (HEAD + "1760000000000,1,1\n", ["line 2", "column arrival_s", "'1760000000000'", "not milliseconds"]),
        (HEAD + "1760000000000000000,1,1\n", ["line 2", "column arrival_s", "'1760000000000000000'"]),
        (HEAD + "1e300,1,1\n", ["line 2", "column arrival_s", "'1e300'", "not milliseconds"]),
        (HEAD + "7,1,1\n40000000,1,1\n8,1,1\n", ["line 3", "column arrival_s", "40000000", "a year", "milliseconds?"]),
        (HEAD + "0,,1\n", ["line 2", "column prompt_tokens", "''"]),
        (HEAD + "0,99999999999999999999999,1\n", ["line 2", "column prompt_tokens", "10,000,000"]),
        (HEAD + "0,1,0\n", ["line 2", "column output_tokens", "from 1"]),
        (HEAD + "0,1,1000001\n", ["line 2", "column output_tokens", "1,000,000"]),
        (HEAD + "0,1," + 9000 * "9" + "\n", ["line 2", "column output_tokens", "'999", "..."]),
        (HEAD + "0,1,1.5\n", ["line 2", "column output_tokens", "whole number"]),
        (HEAD + "0,1,1,a,11\n", ["line 2", "column priority", "-10 to 10"]),
        (HEAD + "0,1,1,a,0,0\n", ["line 2", "column max_wait_s", "above 0"]),
        (HEAD + "0,1,1,a,0,1,extra\n", ["line 2", "more cells than columns"]),
        (HEAD + '0,1,1,"a\nb",0,none\n', ["line 3", "column max_wait_s"]),
    ],
)
def test_an_error_names_the_line_and_column(tmp_path: Path, text: str, words: list[str]) -> None:
    path = trace(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    for word in ["calls.csv", *words]:
        assert word in caught.value.message
    assert len(caught.value.message) < 300 + len(str(path))


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.csv: No such file"):
        read_trace(tmp_path / "nowhere.csv")
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="not a CSV file in UTF-8"):
        read_trace(path)
