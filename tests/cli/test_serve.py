"""`chatstream serve`: startup, options, requests and shutdown."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from chatstream import LoadSettings, MockEngine
from chatstream.cli.app import run
from tests.cli import command
from tests.cli.command import ServerProcess, serving

MOCK = ("--engine", "mock")
LOADING = Path(__file__).parent / "loading.py"


class Events:
    """An open `/chat_stream`, read event by event."""

    def __init__(self, response: httpx2.Response) -> None:
        self._events = iter(httpx2.EventSource(response))

    def until(self, kind: str) -> dict[str, Any]:
        """Skip to the next event of this kind and return its data."""
        data: dict[str, Any] = next(json.loads(event.data) for event in self._events if event.event == kind)
        return data

    def rest(self) -> list[str]:
        """Return the kinds of all further events."""
        return [event.event for event in self._events]


@contextmanager
def asking(client: httpx2.Client, user_input: str = "Hello") -> Iterator[Events]:
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/chat_stream", json={"user_input": user_input}, headers=headers) as response:
        assert response.status_code == 200, response.read()
        yield Events(response)


def connected(server: ServerProcess) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=30.0)


@contextmanager
def one_running_one_waiting(server: ServerProcess) -> Iterator[tuple[Events, Events]]:
    with (
        server.client() as first,
        server.client() as second,
        asking(first) as runs,
    ):
        runs.until("started")
        with asking(second) as waits:
            assert waits.until("queued")["position"] == 1
            yield runs, waits


# --- ready ----------------------------------------------------------------------------------------------------------


def test_the_printed_urls_work() -> None:
    with serving() as server, server.client() as client:
        assert "chatstream-demo is ready" in server.lines[0]
        page, api = (
            line.split()[line.split().index("page" if "page" in line else "API") + 1] for line in server.lines[1:]
        )
        assert client.get(page).headers["content-type"].startswith("text/html")
        assert client.get(f"{api}/models").json()["data"][0]["id"] == "chatstream-demo"
        assert client.get("/health/ready").status_code == 200
        with asking(client) as events:
            assert events.until("done")["finish_reason"] == "stop"


def test_an_environment_variable_is_an_option_and_the_command_line_takes_precedence() -> None:
    env = command.environment(
        CHATSTREAM_ENGINE="mock",
        CHATSTREAM_MAX_CONCURRENCY="3",
        CHATSTREAM_MAX_QUEUE_SIZE="9",
        CHATSTREAM_API_KEY="one two",
    )
    with serving("--max-concurrency", "4", env=env) as server, server.client() as client:
        load = client.get("/get_load").json()["chatstream_workers"][0]
        assert (load["max_processing"], load["max_waiting"]) == (4, 9)
        assert client.get("/v1/models").status_code == 401
        for key in ("one", "two"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", LoadSettings()),
        ("--device cpu --dtype bfloat16 --prepack on", LoadSettings(device="cpu", dtype="bfloat16", prepack="on")),
        ("--context-len 64 --num-threads 1", LoadSettings(context_len=64, num_threads=1)),
        ("--prefix-cache-mib 2", LoadSettings(prefix_cache_bytes=2 * 2**20)),
        ("--prefix-cache-mib 0 --cuda-graphs auto", LoadSettings(prefix_cache_bytes=0, cuda_graphs="auto")),
        ("--cuda-graphs off", LoadSettings()),
    ],
)
def test_load_options_become_load_settings(
    options: str, expected: LoadSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LoadSettings] = []

    def engine_for(model: str, tokenizer: None, load: LoadSettings, **_: object) -> MockEngine:
        made.append(load)
        return MockEngine()

    monkeypatch.setattr("chatstream.config.engine_for", engine_for)
    monkeypatch.setattr("chatstream.server.serve", lambda *_, **__: None)
    monkeypatch.setattr("chatstream.cli.serve._set_up_logging", lambda level: None)
    assert run(["serve", "some/model", *options.split()]) == 0
    assert made == [expected]


def test_an_allowed_origin_may_call() -> None:
    origins = ("--cors-origin", "https://a.example", "--cors-origin", "https://b.example")
    with serving(*MOCK, *origins) as server, server.client() as client:
        for origin, allowed in (("https://b.example", "https://b.example"), ("https://c.example", None)):
            answer = client.get("/get_load", headers={"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_options_without_effect_are_logged() -> None:
    with serving(*MOCK, "--ageing", "5", env=command.environment(WEB_CONCURRENCY="4")) as server:
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        log = server.stderr()
        assert "WEB_CONCURRENCY=4 is ignored" in log
        assert "--ageing has no effect with the policy fcfs, only with priority" in log


# --- a stop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_at_a_signal_running_requests_finish_and_waiting_ones_end(signal_number: signal.Signals) -> None:
    with (
        serving(*MOCK, "--max-concurrency", "1", "--mock-time-per-token", "0.05") as server,
        one_running_one_waiting(server) as (runs, waits),
    ):
        server.send(signal_number)
        assert waits.until("error")["code"] == "shutting_down"
        with pytest.raises(httpx2.ConnectError), server.client() as late:
            late.get("/health/live")
        assert runs.rest()[-1] == "done"
        assert server.wait() == 0


def test_after_a_signal_idle_connections_close_and_an_arriving_request_is_refused() -> None:
    head = "POST /chat_stream HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nContent-Length: 23\r\n\r\n"
    with (
        serving(*MOCK, "--max-concurrency", "1", "--mock-time-per-token", "0.05") as server,
        one_running_one_waiting(server) as (runs, waits),
        connected(server) as idle,
        connected(server) as arriving,
    ):
        idle.sendall(b"GET /health/ready HTTP/1.1\r\nHost: here\r\n\r\n")
        received = b""
        while not received.endswith(b'{"status":"ready"}'):
            received += idle.recv(10_000)
        arriving.sendall(head.encode())
        assert arriving.recv(10_000).startswith(b"HTTP/1.1 100 ")  # the server waits for the body
        server.send(signal.SIGTERM)
        assert waits.until("error")["code"] == "shutting_down"
        assert idle.recv(10_000) == b""
        arriving.sendall(b'{"user_input": "Hello"}')
        assert arriving.recv(10_000).startswith(b"HTTP/1.1 503 ")
        assert runs.rest()[-1] == "done"
        assert server.wait() == 0


def test_after_the_grace_time_running_requests_end_with_an_error_event() -> None:
    with (
        serving(*MOCK, "--mock-type", "long", "--max-concurrency", "1", "--grace", "0.2") as server,
        one_running_one_waiting(server) as (runs, waits),
    ):
        server.send(signal.SIGTERM)
        assert waits.until("error")["code"] == "shutting_down"
        assert runs.until("error")["code"] == "shutting_down"
        assert server.wait() == 0
        assert "Traceback" not in server.stderr()


def test_a_second_ctrl_c_does_not_wait_for_the_grace_time() -> None:
    with (
        serving(*MOCK, "--mock-type", "long", "--max-concurrency", "1", "--grace", "3600") as server,
        one_running_one_waiting(server) as (runs, waits),
    ):
        server.send(signal.SIGINT)
        assert waits.until("error")["code"] == "shutting_down"
        server.send(signal.SIGINT)
        assert runs.until("error")["code"] == "shutting_down"
        assert server.wait() == 0


# --- loading --------------------------------------------------------------------------------------------------------


@contextmanager
def loading() -> Iterator[ServerProcess]:
    with command.running(LOADING) as process:
        yield ServerProcess(process, command.read_line(process).strip(), [])


def send_word(server: ServerProcess, word: str) -> None:
    assert server.process.stdin is not None
    os.write(server.process.stdin.fileno(), word.encode())


def test_while_the_model_loads_the_server_answers_and_requests_wait() -> None:
    with loading() as server, server.client() as client:
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        with asking(client) as events:
            assert events.until("queued")["position"] == 1
            send_word(server, "go")
            assert events.until("done")["finish_reason"] == "stop"
        assert command.read_line(server.process) == "ready\n"
        assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("word", "message"),
    [("config", "ConfigError no such checkpoint"), ("bug", "ConfigError cannot load late: division by zero")],
)
def test_a_model_that_cannot_be_loaded_ends_the_server(word: str, message: str) -> None:
    with loading() as server, server.client() as client, asking(client) as events:
        events.until("queued")
        send_word(server, word)
        assert events.until("error")["code"] == "shutting_down"
        assert server.wait() == 3
        assert server.stderr().splitlines()[-1] == message


def test_a_signal_while_the_model_loads_ends_the_server() -> None:
    with loading() as server, server.client() as client, asking(client) as events:
        events.until("queued")
        server.send(signal.SIGTERM)
        assert events.until("error")["code"] == "shutting_down"
        assert server.wait() == 0
