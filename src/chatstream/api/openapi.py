"""Endpoints that stand in the OpenAPI document though they read, check and refuse their bodies themselves."""

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
    """`body` and `query`: what the endpoint parses, for the document only."""
    said: dict[str, Any] = {}
    if body is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
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
        said["parameters"] = parameters
    router.add_api_route(path, endpoint, methods=[method], response_class=Response, openapi_extra=said)
    if method == "GET":  # for monitors; in no document
        router.add_route(path, endpoint, methods=["HEAD"])


@cache
def _schema(kind: type[Body] | type[Query]) -> Any:
    """With nested definitions where they are used, so that it fits into the document of anybody's application."""
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
