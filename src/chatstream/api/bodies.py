"""Request bodies, read up to a size limit, and query strings: validated, with errors that name the wrong field."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from chatstream.errors import BodyTooLarge, ChatStreamError, InvalidRequest, UnsupportedParameter


class Body(BaseModel):
    """Strict: no type coercion; unknown fields are refused by name; null means "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Query(BaseModel):
    """Query parameters of a URL: text, converted to the field types. Unknown parameters are ignored."""


StopStrings: TypeAlias = str | Annotated[list[str], Field(fail_fast=True)]
"""Validation stops at the first error of a list: a megabyte of errors would block the event loop for seconds."""

B = TypeVar("B", bound=Body)
Q = TypeVar("Q", bound=Query)


READ_ON_FACTOR = 4
"""A body that is too large is read up to this multiple of the limit before the connection is closed."""
MAX_EXPLAINED_BYTES = 64 * 1024
"""A larger body that is no valid JSON is refused without a search for the field: it would block the event loop."""
MAX_SHOWN_CHARACTERS = 100
"""Characters of an unknown field's name that an error message quotes."""
MAX_EXPLAINED_ERRORS = 1000
"""With more validation errors no single one is picked: with an error in every byte that took seconds."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises `BodyTooLarge`; never holds more than `max_bytes` in memory."""
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > max_bytes
    body, num_read = bytearray(), 0
    async for chunk in request.stream():
        num_read += len(chunk)
        is_too_large = is_too_large or num_read > max_bytes
        # Read on and discard: many clients do not read the response before they have sent the whole body.
        if num_read > READ_ON_FACTOR * max_bytes:
            break
        if not is_too_large:
            body += chunk
    if is_too_large:
        raise too_large
    return bytes(body)


def parse_body(kind: type[B], body: bytes | str) -> B:
    """Validate a JSON body. Raises `InvalidRequest` or `UnsupportedParameter` with the field's name."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_query(kind: type[Q], request: Request) -> Q:
    """Validate the query string. Raises `InvalidRequest` with the parameter's name."""
    try:
        return kind.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ChatStreamError:
    if error.error_count() > MAX_EXPLAINED_ERRORS:
        return InvalidRequest(f"the body has {error.error_count()} validation errors")
    # Of the branches of a union, the error with the longest path is the most specific one.
    problems: list[Any] = [*error.errors(include_url=False, include_context=False)]
    problem = max(problems, key=lambda problem: len(problem["loc"]))
    if problem["type"] == "json_invalid":
        return _unreadable(problem["input"], problem["msg"].removeprefix("Invalid JSON: "))
    is_unknown, last = problem["type"] == "extra_forbidden", len(problem["loc"]) - 1
    # pydantic adds names of union branches ("str", "list[str]"): keep only fields and indexes. An unknown field may
    # have any name.
    parts = [part for n, part in enumerate(problem["loc"]) if _is_field(part) or (is_unknown and n == last)]
    path = [f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in parts]
    param = "".join(path).removeprefix(".") or None
    if is_unknown:
        return UnsupportedParameter(f"{param} is not supported", param=param)
    if param is None:
        return InvalidRequest("the body must be a JSON object")
    return InvalidRequest(f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}", param=param)


def _unreadable(body: bytes | str, why: str) -> InvalidRequest:
    """Name the field where pydantic's parser cannot: a lone surrogate or a huge number is a syntax error to it.

    Python's parser accepts both.
    """
    try:
        fields = json.loads(body, parse_int=float) if len(body) <= MAX_EXPLAINED_BYTES else None
        wrong = {_why_wrong(value): _shown(name) for name, value in fields.items()} if isinstance(fields, dict) else {}
    except (ValueError, RecursionError):
        wrong = {}
    for what in (_LONE_SURROGATE, _OUT_OF_RANGE):
        if what in wrong:
            return InvalidRequest(f"{wrong[what]}: {what}", param=wrong[what])
    return InvalidRequest(f"the body cannot be read as JSON: {why}")


_LONE_SURROGATE, _OUT_OF_RANGE = "a lone surrogate is not valid Unicode", "the number is out of range"


def _why_wrong(value: object) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATE
    except ValueError:
        return _OUT_OF_RANGE
    return None


def _shown(name: str) -> str:
    """A printable, shortened form of a field's name."""
    return name[:MAX_SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part != "str")
