"""Endpoints that stand in the OpenAPI document though they read, check and refuse their bodies themselves."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from chatstream.api.bodies import Body
from chatstream.api.errors import Endpoint


def add_endpoint(router: APIRouter, method: str, path: str, endpoint: Endpoint, body: type[Body] | None = None) -> None:
    """`body`: what the endpoint parses, for the document only."""
    said: dict[str, Any] = {}
    if body is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
    names = re.findall(r"{(\w+)", path)
    if names:
        said["parameters"] = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    router.add_api_route(path, endpoint, methods=[method], response_class=Response, openapi_extra=said)
    if method == "GET":  # for monitors; in no document
        router.add_route(path, endpoint, methods=["HEAD"])


@cache
def _schema(kind: type[Body]) -> Any:
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
