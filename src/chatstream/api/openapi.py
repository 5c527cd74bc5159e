"""Adds endpoints that read and validate their bodies themselves to the OpenAPI document."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from chatstream.api.bodies import Body, Query
from chatstream.api.errors import Endpoint


def add_endpoint(
    router: APIRouter,
    method: str,
    path: str,
    endpoint: Endpoint,
    body: type[Body] | None = None,
    query: type[Query] | None = None,
) -> None:
    """Add a route. `body` and `query` are the types that the endpoint parses; only the document uses them."""
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", path)
    ]
    if query is not None:
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in _schema(query)["properties"].items()
        ]
    if parameters:
        extra["parameters"] = parameters
    router.add_api_route(path, endpoint, methods=[method], response_class=Response, openapi_extra=extra)
    if method == "GET":  # HEAD for monitors, not in the document
        router.add_route(path, endpoint, methods=["HEAD"])


@cache
def _schema(kind: type[Body] | type[Query]) -> Any:
    """JSON schema with nested definitions inlined, so that it fits into the document of a host application."""
    schema = kind.model_json_schema()
    return _inline(schema, schema.pop("$defs", {}))


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    match node:
        case {"$ref": str(ref)}:
            return _inline(definitions[ref.removeprefix("#/$defs/")], definitions)
        case dict():
            return {key: _inline(value, definitions) for key, value in node.items()}
        case list():
            return [_inline(value, definitions) for value in node]
    return node
