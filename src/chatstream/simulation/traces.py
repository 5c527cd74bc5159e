"""Reads calls from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from chatstream.errors import ConfigError
from chatstream.simulation.workloads import MAX_REQUESTS, Call

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL = ("client", "priority", "max_wait_s")
MAX_SPAN_S = 366 * 86400.0
"""Maximum time between the first and the last arrival: a longer one is a wrong unit. Public traces span 4 months."""
MAX_ARRIVAL_S = 1e11
"""Maximum arrival time. Seconds since 1970 stay below it until the year 5138; milliseconds since 1970 exceed it."""
MAX_PROMPT_TOKENS = 10_000_000
"""The longest context of any model."""
MAX_OUTPUT_TOKENS = 1_000_000


def read_trace(path: Path) -> list[Call]:
    """Read the calls of a file, sort them by time and shift the first one to 0.

    The first line names the columns: `arrival_s, prompt_tokens, output_tokens` and optionally `client`, `priority` and
    `max_wait_s`, in any order. An empty optional cell means the default. The origin of the times is arbitrary. Raises
    `ConfigError` with the file, line and column of the first error.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_columns(path, reader.fieldnames or ())
            lines: list[tuple[Call, int]] = []
            for row in reader:
                if len(lines) == MAX_REQUESTS:
                    raise ConfigError(f"{path}, line {reader.line_num}: more than {MAX_REQUESTS:,} calls")
                lines.append((_call(path, reader.line_num, row), reader.line_num))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not lines:
        raise ConfigError(f"{path} has no calls, only the line of column names")
    lines.sort(key=lambda pair: pair[0].at_s)
    first_s, (last, line) = lines[0][0].at_s, lines[-1]
    if last.at_s - first_s > MAX_SPAN_S:
        raise ConfigError(
            f"{path}, line {line}, column arrival_s: {last.at_s:.15g} is {last.at_s - first_s:,.0f} s after the first "
            f"arrival; at most a year, {MAX_SPAN_S:,.0f} s (milliseconds?)"
        )
    return [call._replace(at_s=call.at_s - first_s) for call, _ in lines]


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ConfigError(f"{path}, line 1: column {missing[0]} is missing; required are {', '.join(REQUIRED)}")
    strange = [name for name in names if name not in REQUIRED + OPTIONAL]
    if strange:
        raise ConfigError(
            f"{path}, line 1: unknown column {strange[0]!r}; known columns are {', '.join(REQUIRED + OPTIONAL)}"
        )
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{path}, line 1: column {repeated[0]} appears more than once")


def _call(path: Path, line: int, row: Mapping[str | None, Any]) -> Call:
    if None in row:
        raise ConfigError(f"{path}, line {line}: more cells than columns")
    values: dict[str, Any] = {}
    for name in REQUIRED + OPTIONAL:
        text = (row.get(name) or "").strip()
        if not text and name in OPTIONAL:
            continue
        parse, expected = _COLUMNS[name]
        try:
            values[name] = parse(text)
        except ValueError:
            raise ConfigError(f"{path}, line {line}, column {name}: {shortened(text)} is not {expected}") from None
    return Call(values.pop("arrival_s"), **values)


def _seconds(text: str) -> float:
    value = float(text)
    if not (isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _arrival(text: str) -> float:
    if (value := _seconds(text)) > MAX_ARRIVAL_S:
        raise ValueError(text)
    return value


def _above_zero(text: str) -> float:
    if (value := _seconds(text)) == 0:
        raise ValueError(text)
    return value


def _count(at_least: int, at_most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not at_least <= (value := int(text)) <= at_most:
            raise ValueError(text)
        return value

    return parse


def _priority(text: str) -> int:
    if not -10 <= (value := int(text)) <= 10:
        raise ValueError(text)
    return value


_COLUMNS: dict[str, tuple[Callable[[str], Any], str]] = {
    "arrival_s": (_arrival, f"a number of seconds, not milliseconds, from 0 to {MAX_ARRIVAL_S:,.0f}"),
    "prompt_tokens": (_count(0, MAX_PROMPT_TOKENS), f"a whole number from 0 to {MAX_PROMPT_TOKENS:,}"),
    "output_tokens": (_count(1, MAX_OUTPUT_TOKENS), f"a whole number from 1 to {MAX_OUTPUT_TOKENS:,}"),
    "client": (str, "a name"),
    "priority": (_priority, "a whole number from -10 to 10"),
    "max_wait_s": (_above_zero, "a number of seconds above 0"),
}
