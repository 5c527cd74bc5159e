"""`chatstream serve` with a killed engine, over real sockets."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.cli.command import ServerProcess, serving

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")

NUM_CLIENTS = 6


def child_of(server: ServerProcess) -> int:
    (pid,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(pid)


def kinds_and_text(client: httpx2.Client) -> tuple[list[str], str]:
    """Send a message and read all events."""
    headers = {"accept": "text/event-stream"}
    body = {"user_input": "What is a slot?", "temperature": 0}
    with client.stream("POST", "/chat_stream", json=body, headers=headers) as response:
        assert response.status_code == 200
        events = [(event.event, json.loads(event.data)) for event in httpx2.EventSource(response)]
    return [kind for kind, _ in events], "".join(data["text"] for kind, data in events if kind == "token")


def ask_in_a_new_conversation(server: ServerProcess) -> tuple[list[str], str]:
    with server.client() as client:
        return kinds_and_text(client)


def test_after_a_killed_engine_all_waiting_requests_are_served() -> None:
    with serving("--max-concurrency", "1", "--max-queue-size", "50") as server, server.client() as client:
        expected = ask_in_a_new_conversation(server)[1]
        killed = child_of(server)
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            os.kill(killed, signal.SIGSTOP)  # so that all of them wait when it dies
            answers = [pool.submit(ask_in_a_new_conversation, server) for _ in range(NUM_CLIENTS)]
            while client.get("/get_load").json()["chatstream_workers"][0]["waiting"] < NUM_CLIENTS - 1:
                pass
            os.kill(killed, signal.SIGKILL)
            ended = [answer.result() for answer in answers]
        # The engine was killed before the first token, so even the running request is answered.
        assert [kinds[-1] for kinds, _ in ended] == ["done"] * NUM_CLIENTS
        assert {text for _, text in ended} == {expected}
        assert child_of(server) != killed
        assert client.get("/health/ready").status_code == 200

        with client.stream(
            "POST", "/chat_stream", json={"user_input": "What is a slot?"}, headers={"accept": "text/event-stream"}
        ) as response:
            events = iter(httpx2.EventSource(response))
            while next(events).event != "token":
                pass
            os.kill(child_of(server), signal.SIGKILL)
            last = [event.event for event in events][-1]
        assert last in ("error", "done"), "done when all of it had been generated before"
        assert ask_in_a_new_conversation(server)[1] == expected
        last_child = child_of(server)
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert not Path(f"/proc/{last_child}").exists()
        assert server.stderr().count("its process was killed by SIGKILL") == 2
