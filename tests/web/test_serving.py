"""HTTP responses of the chat page and its files, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chatstream import web
from chatstream.web import create_web_router

STATIC = sorted((Path(web.__file__).parent / "static").iterdir())
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def client(prefix: str = "") -> TestClient:
    app = FastAPI()
    app.include_router(create_web_router(), prefix=prefix)
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", *(f"/static/{file.name}" for file in STATIC)])
def test_every_file_has_the_security_headers_and_is_revalidated(path: str) -> None:
    response = client().get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"] == CSP
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    again = client().get(path, headers={"If-None-Match": f'"other", W/{response.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/chat.css", "text/css; charset=utf-8"),
        ("/static/chat.js", "text/javascript; charset=utf-8"),
        ("/static/favicon.svg", "image/svg+xml"),
    ],
)
def test_media_types_do_not_depend_on_the_machine(path: str, media_type: str) -> None:
    assert client().get(path).headers["content-type"] == media_type
    head = client().head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == media_type


@pytest.mark.parametrize(
    "path",
    ["/static/", "/static/nothing.js", "/static/__init__.py", "/static/../index.html", "/static/%2e%2e/__init__.py"],
)
def test_only_the_page_s_own_files_are_served(path: str) -> None:
    assert client().get(path).status_code == 404


def test_a_prefix_without_a_slash_redirects_to_the_page() -> None:
    response = client(prefix="/ai").get("/ai?q=1", follow_redirects=False)
    assert response.status_code == 307
    assert response.headers["location"] == "http://testserver/ai/?q=1"


def test_the_page_refers_only_to_its_own_files_by_relative_urls() -> None:
    page = client().get("/").text
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert sorted(addresses) == ["static/chat.css", "static/chat.js", "static/favicon.svg"]


def test_no_file_refers_to_another_server() -> None:
    for file in STATIC:
        found = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z0-9.]+", file.read_text(encoding="utf-8"))
        assert set(found) <= {"http://www.w3.org"}, file.name  # the SVG namespace, not fetched


def test_no_script_turns_text_into_markup() -> None:
    for file in STATIC:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", file.read_text("utf-8")
        )
