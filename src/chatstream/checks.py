"""Checks of single values, with one rule and one wording for each kind.

Each function raises an error with `param=name` if the value is invalid: `ConfigError` for a setting; pass
`error=InvalidRequest` for a field of a request. Bools, NaN and infinity are not numbers; None is valid only with
`or_none`. The message shows the value, shortened. Do not check secrets here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from reprlib import Repr

from chatstream.errors import ChatStreamError, ConfigError

_short = Repr()
_short.maxlevel = 1  # the default, 6, shows nested lists of up to 6 ** 6 items


def check_int(
    name: str,
    value: object,
    *,
    at_least: int,
    at_most: int | None = None,
    or_none: bool = False,
    error: type[ChatStreamError] = ConfigError,
) -> None:
    if not ((or_none and value is None) or (isinstance(value, int) and _is_within(value, None, at_least, at_most))):
        raise _wrong(name, value, f"a whole number{_bounds(None, at_least, at_most)}", error)


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    or_none: bool = False,
    error: type[ChatStreamError] = ConfigError,
) -> None:
    """Pass either `above` or `at_least`."""
    if not ((or_none and value is None) or _is_within(value, above, at_least, at_most)):
        raise _wrong(name, value, f"a number{_bounds(above, at_least, at_most)}", error)


def check_seconds(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    or_none: bool = False,
    error: type[ChatStreamError] = ConfigError,
) -> None:
    """Without `at_least` the time must be above 0."""
    above = 0 if at_least is None else None
    if not ((or_none and value is None) or _is_within(value, above, at_least, at_most)):
        raise _wrong(name, value, f"a number of seconds{_bounds(above, at_least, at_most)}", error)


def check_choice(name: str, value: object, choices: Collection[str], *, or_none: bool = False) -> None:
    if not ((or_none and value is None) or (isinstance(value, str) and value in choices)):
        raise _wrong(name, value, f"one of {', '.join(choices)}", ConfigError)


def _is_within(value: object, above: float | None, at_least: float | None, at_most: float | None) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # neither NaN nor infinity, nor an int beyond the range of a float
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )


def _bounds(above: float | None, at_least: float | None, at_most: float | None) -> str:
    if above is not None:
        return f" above {_number(above)}" + (f" and at most {_number(at_most)}" if at_most is not None else "")
    assert at_least is not None
    if at_most is not None:
        return f" between {_number(at_least)} and {_number(at_most)}"
    return f", at least {_number(at_least)}"


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:,g}"


def _wrong(name: str, value: object, right: str, error: type[ChatStreamError]) -> ChatStreamError:
    try:
        shown = _short.repr(value)
    except ValueError:  # an int of thousands of digits has no text
        shown = "a number of too many digits"
    return error(f"{name} must be {right}, not {shown}", param=name)
