"""Authentication and authorisation of callers."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.responses import Response

from chatstream import AccessSettings
from chatstream.access import MAX_CONVERSATION_CHARS, Access
from chatstream.errors import ConfigError, Forbidden, InvalidRequest, Unauthorized


def request(client: tuple[str, int] | None = ("127.0.0.1", 1), scheme: str = "http", **headers: str) -> Request:
    return Request(
        {
            "type": "http", "method": "POST", "path": "/", "query_string": b"", "scheme": scheme, "client": client,
            "server": ("x", 80), "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        }
    )  # fmt: skip


def with_cookie(access: Access, session_id: str, **headers: str) -> Request:
    response = Response()
    access.set_session(response, request(), session_id)
    return request(cookie=response.headers["set-cookie"].split(";")[0], **headers)


def test_without_keys_every_caller_may_generate_and_is_identified_by_address() -> None:
    caller = Access().identify(request(("203.0.113.7", 1)))
    assert (caller.client, caller.key_id) == ("address:203.0.113.7", "")
    assert Access().identify(request(None)).client == "address:unknown"


def test_a_session_is_an_identity_only_if_the_request_sent_its_cookie() -> None:
    access = Access()
    assert access.identify(request()).client.startswith("address:")
    assert access.identify(with_cookie(access, "abcdefghijkl")).client == "session:abcdefgh"
    assert access.identify(with_cookie(Access(), "abcdefghijkl")).client.startswith("address:")


def test_with_keys_one_of_them_is_needed_and_is_the_identity() -> None:
    access = Access(AccessSettings(api_keys=("one", "two")))
    for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}, {"authorization": "one"}):
        with pytest.raises(Unauthorized):
            access.identify(request(**headers))
    one, two = (access.identify(request(authorization=f"Bearer {key}"), user="u") for key in ("one", "two"))
    assert one.key_id != two.key_id
    assert one.client == f"key:{one.key_id}"
    assert "one" not in one.client


def test_the_admin_key_may_generate_too_but_an_api_key_is_not_admin() -> None:
    access = Access(AccessSettings(api_keys=("one",), admin_key="root"))
    assert access.identify(request(authorization="Bearer root")).key_id
    assert access.is_admin(request(authorization="Bearer root"))
    assert not access.is_admin(request(authorization="Bearer one"))
    assert not access.is_admin(request())
    with pytest.raises(Forbidden):
        access.require_admin(request(authorization="Bearer one"))


def test_a_local_address_is_not_admin_if_there_is_an_admin_key() -> None:
    with pytest.raises(Unauthorized):
        Access(AccessSettings(admin_key="root")).require_admin(request())


def test_a_caller_without_an_address_is_not_local() -> None:
    Access().require_admin(request())
    for client in (None, ("", 0), ("/run/socket", 0), ("::ffff:203.0.113.7", 1)):
        with pytest.raises(Forbidden):
            Access().require_admin(request(client))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "chat.localhost:8000",
        "127.0.0.1",
        "127.8.9.1:80",
        "[::1]",
        "[::1]:8000",
        "box:8000",
        None,
    ],
)
def test_a_local_caller_uses_a_local_host_name_or_none(host: str | None) -> None:
    Access().require_admin(request(**({} if host is None else {"host": host})))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
        "203.0.113.7", "0.0.0.0", "evil.example@localhost", "localhost/evil.example", "::1", "[::1", "[x]", "",
    ],
)  # fmt: skip
def test_a_caller_with_a_foreign_host_name_is_not_local_despite_its_address(host: str) -> None:
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        with pytest.raises(Forbidden, match=r"at 127\.0\.0\.1:80; set an admin key"):
            Access().require_admin(request(**headers))


def test_a_second_host_header_is_checked_too() -> None:
    twice = request(host="localhost")
    twice.scope["headers"].append((b"host", b"evil.example"))
    with pytest.raises(Forbidden):
        Access().require_admin(twice)


def test_a_server_on_a_unix_socket_names_no_port() -> None:
    for server in (None, ("/run/chatstream.sock", None)):
        unknown = request(host="evil.example")
        unknown.scope["server"] = server
        with pytest.raises(Forbidden, match=r"at 127\.0\.0\.1; set"):
            Access().require_admin(unknown)


def test_servers_with_the_same_secret_accept_each_others_sessions() -> None:
    one, two = (Access(AccessSettings(session_secret="s")) for _ in range(2))
    assert two.session_id(with_cookie(one, "abc")) == "abc"
    assert Access().session_id(with_cookie(one, "abc")) != "abc"


def test_new_sessions_are_unguessable_and_all_different() -> None:
    ids = {Access().session_id(request()) for _ in range(100)}
    assert len(ids) == 100
    assert all(len(session_id) >= 22 for session_id in ids)  # 128 bits


@pytest.mark.parametrize("cookie", ["", "x", ".", "a.b", "W10.x", "é", "\x00", "x" * 10_000])
def test_a_foreign_cookie_is_ignored(cookie: str) -> None:
    access = Access()
    assert len(access.session_id(request(cookie=f"chatstream_session={cookie}"))) == 22


def test_a_signed_value_that_is_no_session_is_ignored() -> None:
    access = Access()
    cookie = with_cookie(access, ["not", "a", "session"])  # type: ignore[arg-type]
    assert len(access.session_id(cookie)) == 22


def test_a_cookie_with_one_changed_letter_is_ignored() -> None:
    access = Access()
    cookie = with_cookie(access, "abc").headers["cookie"]
    for n in range(len("chatstream_session="), len(cookie)):
        # A distant letter of the base64 alphabet: of the last letter only the upper bits count.
        tampered = cookie[:n] + ("A" if cookie[n] not in "ABCD" else "z") + cookie[n + 1 :]
        assert access.session_id(request(cookie=tampered)) != "abc"


def test_a_conversation_belongs_to_its_session_and_its_name_is_bounded() -> None:
    access = Access()
    keys = {
        access.conversation_key(request(**headers), session_id)
        for session_id in ("one", "two")
        for headers in ({}, {"x_chatstream_conversation": "a"}, {"x_chatstream_conversation": "b"})
    }
    assert len(keys) == 6
    longest = "x" * MAX_CONVERSATION_CHARS
    access.conversation_key(request(x_chatstream_conversation=longest), "one")
    with pytest.raises(InvalidRequest):
        access.conversation_key(request(x_chatstream_conversation=longest + "x"), "one")


@pytest.mark.parametrize(
    "wrong",
    [{"api_keys": "secret"}, {"api_keys": ("",)}, {"api_keys": (" ",)}, {"admin_key": ""}, {"session_secret": ""}],
)
def test_an_empty_key_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AccessSettings(**wrong)  # type: ignore[arg-type]


def test_the_repr_shows_no_keys() -> None:
    settings = AccessSettings(api_keys=("hunter2",), admin_key="hunter3", session_secret="hunter4")
    assert "hunter" not in repr(settings)
