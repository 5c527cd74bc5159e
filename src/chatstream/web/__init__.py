"""Serves the chat page: plain HTML, CSS and ES modules, without a build step or external files.

Knows files and HTTP headers only. The page calls the public API of the same server by relative URLs, so it works under
any prefix.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

_ROOT = Path(__file__).parent

_MEDIA_TYPES = {
    # Not from `mimetypes`: it reads the Windows registry, where .js may be text/plain, which nosniff then blocks.
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_HEADERS = {
    # Revalidate each time: an upgrade takes effect at once, and unchanged files cost a 304.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_web_router() -> APIRouter:
    """Return a router with the chat page at `/` and its files below `/static/`; may be included with a prefix.

    Reads the files once, here. Any other path below `/static/` is a 404.
    """
    page = _PageFile(_ROOT / "index.html")
    static = {path.name: _PageFile(path) for path in (_ROOT / "static").iterdir() if path.suffix in _MEDIA_TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    def chat_page(request: Request) -> Response:
        return page.respond(request)

    @router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
    def static_file(request: Request, name: str) -> Response:
        if name not in static:
            raise HTTPException(404, f"no such file: {name}")
        return static[name].respond(request)

    return router


class _PageFile:
    """One file in memory. The ETag is a hash of the content, because file times in a wheel are constant."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        etag = '"' + hashlib.sha256(self._body).hexdigest()[:32] + '"'
        self._headers = _HEADERS | {"Content-Type": _MEDIA_TYPES[path.suffix], "ETag": etag}

    def respond(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "").split(",")
        if self._headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)
