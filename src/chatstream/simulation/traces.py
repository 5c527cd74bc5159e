"""A recorded or hand-written list of calls, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from chatstream.errors import ConfigError
from chatstream.simulation.workloads import MAX_REQUESTS, Call

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL = ("client", "priority", "max_wait_s")


def read_trace(path: Path) -> list[Call]:
    """The calls of a file, sorted by time, the first one at 0 or later.

    The first line names the columns: `arrival_s, prompt_tokens, output_tokens` and, where wanted, `client`,
    `priority` and `max_wait_s`, in any order; an empty cell is as good as no column. Raises `ConfigError` naming the
    file, the line and the column of the first thing that is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_columns(path, reader.fieldnames or ())
            calls = [_call(path, reader.line_num, row) for row in reader]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not calls:
        raise ConfigError(f"{path} has no line after the names of its columns")
    if len(calls) > MAX_REQUESTS:
        raise ConfigError(f"{path} has {len(calls):,} lines; {MAX_REQUESTS:,} at most")
    return sorted(calls, key=lambda call: call.at_s)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ConfigError(f"{path}, line 1: there is no column {missing[0]}; needed are {', '.join(REQUIRED)}")
    strange = [name for name in names if name not in REQUIRED + OPTIONAL]
    if strange:
        raise ConfigError(f"{path}, line 1: unknown column {strange[0]!r}; known are {', '.join(REQUIRED + OPTIONAL)}")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{path}, line 1: there is more than one column {repeated[0]}")


def _call(path: Path, line: int, row: Mapping[str | None, Any]) -> Call:
    if None in row:
        raise ConfigError(f"{path}, line {line}: more cells than columns")
    values: dict[str, Any] = {}
    for name in REQUIRED + OPTIONAL:
        text = (row.get(name) or "").strip()
        if not text and name in OPTIONAL:
            continue
        parse, wanted = _COLUMNS[name]
        try:
            values[name] = parse(text)
        except ValueError:
            raise ConfigError(f"{path}, line {line}, column {name}: {text!r} is not {wanted}") from None
    return Call(values.pop("arrival_s"), **values)


def _seconds(text: str) -> float:
    value = float(text)
    if not (isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _above_zero(text: str) -> float:
    if (value := _seconds(text)) == 0:
        raise ValueError(text)
    return value


def _count(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if (value := int(text)) < at_least:
            raise ValueError(text)
        return value

    return parse


def _priority(text: str) -> int:
    if not -10 <= (value := int(text)) <= 10:
        raise ValueError(text)
    return value


_COLUMNS: dict[str, tuple[Callable[[str], Any], str]] = {
    "arrival_s": (_seconds, "a number of seconds of at least 0"),
    "prompt_tokens": (_count(0), "a whole number of at least 0"),
    "output_tokens": (_count(1), "a whole number of at least 1"),
    "client": (str, "a name"),
    "priority": (_priority, "a whole number from -10 to 10"),
    "max_wait_s": (_above_zero, "a number of seconds above 0"),
}
