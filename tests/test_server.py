"""`chatstream.server` in this process; tests/cli/test_serve.py tests the signals of a whole server."""

from __future__ import annotations

import inspect
import logging
import signal
import socket
import sys

import pytest

from chatstream import ChatStream, MockEngine
from chatstream.errors import ConfigError, EngineUnavailable
from chatstream.server import listen, serve


class BrokenEngine(MockEngine):
    async def start(self) -> None:
        raise ZeroDivisionError("division by zero")


def test_an_engine_that_does_not_start_ends_the_server_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatstream")
    handler = signal.getsignal(signal.SIGINT)
    seen: list[str] = []
    with pytest.raises(EngineUnavailable, match="mock-round could not be loaded: ZeroDivisionError: division by zero"):
        serve(ChatStream(engine=BrokenEngine()), port=0, on_listening=seen.append, on_ready=seen.append)
    assert len(seen) == 1
    assert seen[0].startswith("http://127.0.0.1:")
    assert signal.getsignal(signal.SIGINT) == handler
    assert caplog.text == ""  # no log line about a drain: the server never served


@pytest.mark.parametrize("grace_s", [-1.0, float("inf"), float("nan")])
def test_a_grace_time_without_an_end_is_refused(grace_s: float) -> None:
    with pytest.raises(ConfigError, match="grace_s"):
        serve(ChatStream(engine=MockEngine()), port=0, grace_s=grace_s)


def test_a_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; choose another with --port"):
            listen("127.0.0.1", port)


def test_localhost_listens_on_the_ipv4_loopback_address() -> None:
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_connections_send_at_once_and_notice_a_peer_that_vanished() -> None:
    with listen("127.0.0.1", 0, stall_timeout_s=15.0) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


def test_a_deliberately_aborted_response_is_not_logged_as_an_error() -> None:
    """Uses uvicorn's own message, so that the test fails when it changes."""
    from uvicorn.protocols.http import h11_impl, httptools_impl

    from chatstream.server import _is_news

    words = "ASGI callable returned without completing response."
    assert all(words in inspect.getsource(module) for module in (h11_impl, httptools_impl))
    record = logging.LogRecord("uvicorn.error", logging.ERROR, __file__, 1, words, (), None)
    assert not _is_news(record)
    assert _is_news(logging.LogRecord("uvicorn.error", logging.ERROR, __file__, 1, "something else", (), None))
