"""Request bodies, read with a limit, and query strings: checked, and refused by the name of what is wrong in them."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from chatstream.errors import BodyTooLarge, ChatStreamError, InvalidRequest, UnsupportedParameter


class Body(BaseModel):
    """Strict: no coercion, unknown fields are refused by name, and null is as good as not given."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Query(BaseModel):
    """What may stand behind the "?" of an address: text that is made into values. Anything else there is ignored."""


StopStrings: TypeAlias = str | Annotated[list[str], Field(fail_fast=True)]
"""Lists are looked at up to their first mistake: a megabyte of mistakes would hold everybody's answers for seconds."""

B = TypeVar("B", bound=Body)
Q = TypeVar("Q", bound=Query)


READ_ON_FACTOR = 4
"""How far a body that is too large is read, in multiples of the limit, before its connection is broken."""
MAX_EXPLAINED_BYTES = 64 * 1024
"""A body above it that cannot be read is refused without looking for the field: that would take the event loop long."""
MAX_SHOWN_CHARACTERS = 100
"""Of the name of a field that nobody knows."""
MAX_EXPLAINED_MISTAKES = 1000
"""A body with more is not looked through for the one that says most: with one in every byte that took seconds."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises `BodyTooLarge`; never keeps more than `max_bytes`."""
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > max_bytes
    body, num_read = bytearray(), 0
    async for chunk in request.stream():
        num_read += len(chunk)
        is_too_large = is_too_large or num_read > max_bytes
        # Some more is read and thrown away: many clients do not look at the answer before they have sent everything.
        if num_read > READ_ON_FACTOR * max_bytes:
            break
        if not is_too_large:
            body += chunk
    if is_too_large:
        raise too_large
    return bytes(body)


def parse_body(kind: type[B], body: bytes | str) -> B:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_query(kind: type[Q], request: Request) -> Q:
    """Raises `InvalidRequest` naming the parameter."""
    try:
        return kind.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ChatStreamError:
    if error.error_count() > MAX_EXPLAINED_MISTAKES:
        return InvalidRequest(f"the body has {error.error_count()} mistakes")
    # Of the branches of a union, the one that got furthest says best what is wrong.
    problems: list[Any] = [*error.errors(include_url=False, include_context=False)]
    problem = max(problems, key=lambda problem: len(problem["loc"]))
    if problem["type"] == "json_invalid":
        return _unreadable(problem["input"], problem["msg"].removeprefix("Invalid JSON: "))
    is_unknown, last = problem["type"] == "extra_forbidden", len(problem["loc"]) - 1
    # Names of union branches ("str", "list[str]") are pydantic's, not the caller's: only fields and indexes are kept. A
    # field that nobody knows may be called anything.
    parts = [part for n, part in enumerate(problem["loc"]) if _is_field(part) or (is_unknown and n == last)]
    path = [f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in parts]
    param = "".join(path).removeprefix(".") or None
    if is_unknown:
        return UnsupportedParameter(f"{param} is not supported", param=param)
    if param is None:
        return InvalidRequest("the body must be a JSON object")
    return InvalidRequest(f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}", param=param)


def _unreadable(body: bytes | str, why: str) -> InvalidRequest:
    """To pydantic's parser half a surrogate pair and a number of thousands of digits are bad syntax. Python's reads on,
    so that the field can be named."""
    try:
        fields = json.loads(body, parse_int=float) if len(body) <= MAX_EXPLAINED_BYTES else None
        wrong = {_why_wrong(value): _shown(name) for name, value in fields.items()} if isinstance(fields, dict) else {}
    except (ValueError, RecursionError):
        wrong = {}
    for what in (_HALF_A_PAIR, _OUT_OF_RANGE):
        if what in wrong:
            return InvalidRequest(f"{wrong[what]}: {what}", param=wrong[what])
    return InvalidRequest(f"the body cannot be read as JSON: {why}")


_HALF_A_PAIR, _OUT_OF_RANGE = "half a surrogate pair is not valid Unicode", "the number is out of range"


def _why_wrong(value: object) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return _HALF_A_PAIR
    except ValueError:
        return _OUT_OF_RANGE
    return None


def _shown(name: str) -> str:
    """A field may be called anything: what can be told of it."""
    return name[:MAX_SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part != "str")
