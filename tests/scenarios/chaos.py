"""Random faults of clients, engines and operators.

`CoreChaos` calls the scheduler, `ShellChaos` drives the worker in virtual time, `SocketChaos` a server over real
sockets. A seed determines their actions; `faults` counts the faults by kind.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from chatstream import RuntimeSettings
from chatstream.errors import ChatStreamError, EngineUnavailable, Overloaded
from chatstream.runtime import RequestStream
from chatstream.scheduler import QUEUES, Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault, History, run_virtual
from chatstream.testing.fake_engine import Step
from chatstream.types import Done, Failed
from tests.e2e.server import Server
from tests.runtime.harness import Harness

BROKEN: dict[str, Callable[[], list[Step]]] = {
    "engine raises": lambda: [RuntimeError("boom")],
    "engine is out of memory": lambda: [MemoryError()],
    "engine is lost": lambda: [EngineUnavailable("lost")],
    "engine hangs": lambda: [Fault.HANG],
    "engine stops too early": list,
}
"""Endings of a faulty script. Each use makes a new error, because a raised one keeps its traceback alive."""


def random_script(rng: random.Random, fault_share: float, faults: Counter[str]) -> list[Step]:
    """Return the steps of an answer; with probability `fault_share` it breaks off at a random step or never starts."""
    answer: list[Step] = [f"t{n} " for n in range(rng.randint(1, 12))]
    if rng.random() >= fault_share:
        return answer
    kind = rng.choice([*BROKEN, "engine is lost"])
    faults[kind] += 1
    if kind in ("engine is lost", "engine stops too early"):
        answer = answer[: rng.choice([0, 0, 1])]
    return answer[: rng.randint(0, len(answer))] + BROKEN[kind]()


def random_settings(rng: random.Random) -> dict[str, Any]:
    """Return random scheduler settings: a policy, with or without time slices and client limits."""
    return {
        "policy": rng.choice(list(QUEUES)),
        "slice_tokens": rng.choice([None, 2, 4]),
        "max_running_per_client": rng.choice([None, None, 2]),
        "max_waiting_per_client": rng.choice([None, None, 6]),
    }


class ShellChaos:
    """One run of the worker in virtual time. The operator changes some of the initial `settings` during the run."""

    BEHAVIOURS = ("reads", "reads", "reads", "disconnects", "is slow", "is dead", "is cancelled", "comes back")

    def __init__(self, seed: int, num_requests: int, **settings: Any) -> None:
        self.rng = random.Random(seed)
        self.num_requests = num_requests
        self.scripts: dict[str, list[Step]] = {}
        self.seen: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.house = Harness(
            FakeEngine(lambda r: self.scripts[r.request_id], step_s=0.02, prefill_s=0.01),
            can_preempt=True,
            max_concurrency=4,
            max_queue_size=30,
            stall_timeout_s=10.0,
            abort_timeout_s=5.0,
            runtime=RuntimeSettings(max_buffered_tokens=4, reader_stall_timeout_s=3.0, resume_grace_s=5.0),
            observers=(self._fail_sometimes,),
            **settings,
        )
        self.house.history.max_running_per_client = self.house.settings.max_running_per_client

    async def run(self) -> None:
        clients = []
        for n in range(self.num_requests):
            # Bursts and pauses around the capacity of four slots.
            await asyncio.sleep(self.rng.expovariate(6.0) if self.rng.random() < 0.9 else 0.0)
            clients.append(asyncio.create_task(self._client(f"r{n}")))
            if self.rng.random() < 0.002:
                self._operate()
        await asyncio.gather(*clients)
        await asyncio.sleep(60.0)
        await self.house.check_nothing_is_left()

    def _operate(self) -> None:
        worker, rng = self.house.worker, self.rng
        change = rng.choice(["limits change", "policy changes", "intake pauses"])
        self.faults[change] += 1
        if change == "limits change":
            worker.set_limits(max_concurrency=rng.randint(1, 6), by="chaos")
        elif change == "policy changes":
            worker.set_policy(rng.choice(list(QUEUES)), by="chaos")
        else:
            worker.set_paused(True, by="chaos")
            asyncio.get_running_loop().call_later(rng.uniform(0, 3), worker.set_paused, False)

    async def _client(self, request_id: str) -> None:
        rng = self.rng
        self.scripts[request_id] = random_script(rng, 0.1, self.faults)
        try:
            stream = self.house.submit(
                request_id,
                client=f"c{int(rng.expovariate(0.3))}",  # uneven demand of the clients
                conversation=rng.choice([None, None, None, f"k{rng.randint(0, 5)}"]),
                priority=rng.choice([-1, 0, 0, 2]),
                max_wait_s=rng.choice([None, None, 2.0, 10.0]),
                prompt_tokens=rng.randint(0, 50),
            )
        except Overloaded as refusal:
            self.outcomes[refusal.code] += 1
            return
        behaviour = rng.choice(self.BEHAVIOURS)
        if behaviour != "reads":
            self.faults[f"client {behaviour}"] += 1
        if behaviour == "is cancelled":
            asyncio.get_running_loop().call_later(rng.uniform(0, 3), self.house.worker.cancel, request_id)
        if behaviour == "is dead":
            await asyncio.sleep(rng.uniform(5, 50))
        if behaviour == "disconnects":
            await self._leave(stream)
        elif behaviour == "comes back":
            await self._come_back(stream)
        else:
            await self._read(stream, pause_s=rng.uniform(0, 0.5) if behaviour == "is slow" else 0.0)

    async def _leave(self, stream: RequestStream) -> None:
        try:
            async with asyncio.timeout(self.rng.uniform(0, 1.5)):
                await self._read(stream)
        except TimeoutError:
            stream.close()

    async def _come_back(self, stream: RequestStream) -> None:
        """Disconnect from a resumable stream, possibly several times, and reconnect in time or too late."""
        resumables = self.house.worker.resumables
        resumables.keep(stream)
        while stream.end is None and self.rng.random() < 0.8:
            await self._leave(stream)
            await asyncio.sleep(self.rng.uniform(0, 6))
            try:
                stream = resumables.attach(stream.request_id, stream.last_id)
            except ChatStreamError:
                self.outcomes["too late"] += 1
                return
        await self._read(stream)

    async def _read(self, stream: RequestStream, pause_s: float = 0.0) -> None:
        self.seen.setdefault(stream.request_id, "")
        ends = 0
        async for event in stream:
            assert not ends, "no event follows the end"
            if event.type == "token":
                self.seen[stream.request_id] += event.text
                await asyncio.sleep(pause_s)
            elif isinstance(event, Done | Failed):
                ends += 1
                self.outcomes[event.type if isinstance(event, Done) else event.error.code] += 1
                if isinstance(event, Done):
                    generated = self.house.engine.generated[stream.request_id]
                    assert self.seen[stream.request_id] == "".join(generated)
        assert ends == 1 or stream.is_exhausted or stream.is_dismissed

    def _fail_sometimes(self, event: ev.Event) -> None:
        if self.rng.random() < 0.001:
            self.faults["observer raises"] += 1
            raise RuntimeError("an observer")

    def check(self) -> None:
        """Check that each received text is a prefix of its answer, and that every request is accounted for."""
        generated = self.house.engine.generated
        for request_id, seen in self.seen.items():
            assert "".join(generated.get(request_id, [])).startswith(seen)
        stats = self.house.worker.stats()
        assert stats.received == self.num_requests
        assert stats.received == stats.rejected + stats.finished + stats.cancelled + stats.failed + stats.expired
        assert set(self.house.history.tokens) <= set(self.house.history.ended)

    def digest(self) -> str:
        return hashlib.sha256("\n".join(map(repr, self.house.log)).encode()).hexdigest()


def run_shell_chaos(seed: int, num_requests: int, **settings: Any) -> ShellChaos:
    """Run and check. Default settings are those of a plain `fcfs` queue."""
    runs: list[ShellChaos] = []

    async def main() -> None:
        runs.append(ShellChaos(seed, num_requests, **settings))
        await runs[0].run()

    run_virtual(main())
    runs[0].check()
    return runs[0]


# --- the core alone -------------------------------------------------------------------------------------------------


class CoreChaos:
    """The scheduler under random calls, a hundred times as many per second as with the worker. Its log is replayed."""

    def __init__(self, seed: int, num_requests: int, **settings: Any) -> None:
        self.rng = random.Random(seed)
        self.num_requests = num_requests
        self.settings = SchedulerSettings(
            max_concurrency=4, max_queue_size=20, stall_timeout_s=8.0, abort_timeout_s=3.0, **settings
        )
        self.scheduler = Scheduler(self.settings)
        self.history = History(
            4,
            20,
            is_fcfs=self.settings.policy == "fcfs",
            has_slices=True,
            max_running_per_client=self.settings.max_running_per_client,
        )
        self.grants: dict[str, Grant] = {}
        self.old_grants: deque[Grant] = deque(maxlen=8)
        self.faults: Counter[str] = Counter()
        self.now_s = 0.0

    def run(self) -> None:
        self.scheduler.open(0.0, can_preempt=True)
        number = 0
        while number < self.num_requests:
            self._advance_time()
            if self.rng.random() < 0.25:
                self._submit(f"r{number}")
                number += 1
            else:
                self._random_call()
            self._take()
        self.scheduler.open(self.now_s, can_preempt=True)
        self._take()
        for _ in range(self.num_requests):  # the watchdog ends the hanging requests
            for grant in list(self.grants.values()):
                self.scheduler.on_ended(grant, Outcome.FINISHED, "stop", self.now_s)
                self._take()
            due_s = self.scheduler.next_deadline_s()
            if due_s is None:
                break
            self.now_s = max(self.now_s, due_s)
            self.scheduler.handle_timer(self.now_s)
            self._take()
        self.history.check_complete()
        stats = self.scheduler.stats()
        assert stats.received == stats.rejected + stats.finished + stats.cancelled + stats.failed + stats.expired
        assert self.scheduler.next_deadline_s() is None
        assert not any(self.scheduler.records().values())

    def _advance_time(self) -> None:
        """Advance the time, usually a little and with punctual timers; sometimes more, or with a late timer."""
        until_s = self.now_s + self.rng.expovariate(10.0)
        if self.rng.random() < 0.002:
            self.faults["time jumps"] += 1
            until_s += self.rng.uniform(1.0, 15.0)
        is_late = self.rng.random() < 0.01
        self.faults["timer is late"] += is_late
        while not is_late and (due_s := self.scheduler.next_deadline_s()) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.scheduler.handle_timer(self.now_s)
            self._take()
        self.now_s = until_s

    def _submit(self, request_id: str) -> None:
        rng = self.rng
        try:
            self.scheduler.submit(
                Arrival(
                    request_id=request_id,
                    client=f"c{int(rng.expovariate(0.3))}",
                    conversation=f"k{rng.randrange(6)}" if rng.random() < 0.25 else None,
                    priority=rng.choice([-1, 0, 0, 2]),
                    max_wait_s=rng.choice([None, None, 2.0, 10.0]),
                    prompt_tokens=rng.randrange(50),
                ),
                self.now_s,
            )
        except Overloaded:
            pass

    def _random_call(self) -> None:
        rng, scheduler, now_s = self.rng, self.scheduler, self.now_s
        choice = rng.random()
        if choice < 0.002:
            self._operate()
        elif choice < 0.02 and self.old_grants:
            self.faults["late report"] += 1
            grant = rng.choice(self.old_grants)
            if self.grants.get(grant.request_id) != grant:
                scheduler.on_tokens(grant, 1, now_s)
                scheduler.on_preempted(grant, now_s)
                scheduler.on_ended(grant, Outcome.FAILED, "late", now_s)
        elif choice < 0.06 and self.history.waiting:
            self.faults["cancelled while waiting"] += 1
            scheduler.cancel(rng.choice(list(self.history.waiting)), "client", now_s)
        elif self.grants:
            self._report(rng.choice(list(self.grants)), rng.random())

    def _report(self, request_id: str, choice: float) -> None:
        scheduler, grant, now_s = self.scheduler, self.grants[request_id], self.now_s
        running = self.history.running.get(request_id)
        if running is not None and running.is_preempting and choice < 0.7:
            scheduler.on_preempted(grant, now_s)
        elif choice < 0.7:
            if running is None or not running.is_aborting:
                scheduler.on_tokens(grant, 1, now_s, prompt_tokens=self.rng.choice([0, 0, 20]))
        elif choice < 0.74:
            self.faults["cancelled"] += 1
            scheduler.cancel(request_id, "client", now_s)
        elif choice < 0.78:
            self.faults["engine is lost"] += 1
            if not scheduler.requeue(grant, now_s):
                scheduler.on_ended(grant, Outcome.FAILED, "engine_unavailable", now_s)
        elif choice < 0.81:
            self.faults["engine fails"] += 1
            scheduler.on_ended(grant, Outcome.FAILED, "engine_error", now_s)
        elif choice < 0.99:
            scheduler.on_ended(grant, Outcome.FINISHED, "stop", now_s)
        else:
            self.faults["engine hangs"] += 1
            del self.grants[request_id]  # no further report comes

    def _operate(self) -> None:
        rng, scheduler, now_s = self.rng, self.scheduler, self.now_s
        change = rng.choice(["limits change", "policy changes", "intake pauses", "drain"])
        self.faults[change] += 1
        if change == "limits change":
            scheduler.set_limits(now_s, max_concurrency=rng.randint(1, 6), max_queue_size=rng.randint(0, 25))
        elif change == "policy changes":
            scheduler.set_policy(rng.choice(list(QUEUES)), now_s)
        elif change == "intake pauses":
            scheduler.pause(now_s)
            self._take()
            scheduler.unpause(now_s)
        else:
            scheduler.drain(now_s)
            self._take()
            scheduler.open(now_s, can_preempt=True)

    def _take(self) -> None:
        events = self.scheduler.take_events()
        self.history.feed(events)
        for event in events:
            if isinstance(event, ev.Started | ev.Resumed):
                self.grants[event.request_id] = event.grant
            elif isinstance(event, ev.Requeued | ev.Preempted):
                self.old_grants.append(event.grant)
            elif isinstance(event, ev.Finished | ev.Cancelled | ev.Failed | ev.Expired):
                self.grants.pop(event.request_id, None)


# --- over real sockets ----------------------------------------------------------------------------------------------


class SocketChaos:
    """Clients of every kind, and an operator, against a real server with a fake engine."""

    BEHAVIOURS = (
        "reads", "reads", "reads", "reads old", "asks openai", "disconnects", "disconnects", "cancels", "comes back",
        "is reset", "sends half",
    )  # fmt: skip

    def __init__(self, server: Server, engine: FakeEngine, seed: int) -> None:
        self.server = server
        self.engine = engine
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    async def run(self, num_requests: int, at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        # Below the server's keep-alive time: otherwise a request may meet the closing of its connection.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=at_once, keepalive_expiry=1.0)
        async with self.server.client(limits=limits) as client:

            async def one(n: int) -> None:
                async with gate:
                    await self._client(client, n)
                    if self.rng.random() < 0.01:
                        await self._operate(client)

            await asyncio.gather(*(one(n) for n in range(num_requests)))

    async def _operate(self, client: httpx2.AsyncClient) -> None:
        rng = self.rng
        change, body = rng.choice(
            [
                ("limits change", {"max_concurrency": rng.randint(1, 4), "max_queue_size": rng.randint(20, 40)}),
                ("policy changes", {"policy": rng.choice(list(QUEUES))}),
                ("intake pauses", {"paused": True}),
            ]
        )
        self.faults[change] += 1
        assert (await client.patch("/queue", json=body)).status_code == 200
        if "paused" in body:
            await asyncio.sleep(0.01)
            assert (await client.patch("/queue", json={"paused": False})).status_code == 200

    async def _client(self, client: httpx2.AsyncClient, n: int) -> None:
        behaviour = self.rng.choice(self.BEHAVIOURS)
        if behaviour in ("disconnects", "cancels", "comes back", "is reset", "sends half"):
            self.faults[f"client {behaviour}"] += 1
        if behaviour == "asks openai":
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
            response = await client.post("/v1/chat/completions", json=body)
            self.outcomes[f"openai {response.status_code}"] += 1
            return
        if behaviour in ("is reset", "sends half"):
            await self._break_off(whole=behaviour == "is reset")
            return
        body = {"user_input": "x"} | ({"resumable": True} if behaviour == "comes back" else {})
        headers = {"x-chatstream-conversation": str(n)}
        if behaviour != "reads old":
            headers["accept"] = "text/event-stream"
        response = await client.send(
            client.build_request("POST", "/chat_stream", json=body, headers=headers), stream=True
        )
        try:
            if response.status_code != 200:
                self.outcomes[f"refused {response.status_code}"] += 1
                await response.aread()
            elif behaviour == "disconnects":
                await self._read_some(response)
                self.outcomes["disconnected"] += 1
            elif behaviour == "reads old":
                await self._read_old(response)
            elif behaviour == "comes back":
                await self._come_back(client, response)
            else:
                if behaviour == "cancels":
                    request_id = response.headers["x-chatstream-request-id"]
                    assert (await client.delete(f"/requests/{request_id}")).status_code == 204
                    assert (await client.delete(f"/requests/{request_id}")).status_code == 204
                await self._read(response)
        finally:
            await response.aclose()

    async def _read(self, response: httpx2.Response, seen: str = "") -> None:
        events = [event async for event in httpx2.EventSource(response)]
        ends = [event for event in events if event.event in ("done", "error")]
        assert len(ends) == 1
        assert events[-1] is ends[0]
        text = seen + "".join(json.loads(event.data)["text"] for event in events if event.event == "token")
        generated = "".join(self.engine.generated.get(response.headers["x-chatstream-request-id"], []))
        assert generated.startswith(text)
        if ends[0].event == "done":
            assert text == generated
        self.outcomes[ends[0].event] += 1

    async def _read_old(self, response: httpx2.Response) -> None:
        try:
            body = (await response.aread()).decode()
        except httpx2.RemoteProtocolError:
            self.outcomes["old broken"] += 1  # the only way in which the old format reports a failed answer
            return
        generated = "".join(self.engine.generated[response.headers["x-chatstream-request-id"]])
        assert body.split("<::EOS::>")[-2] == generated.strip()
        self.outcomes["old done"] += 1

    async def _read_some(self, response: httpx2.Response) -> None:
        num_chunks = self.rng.randint(0, 4)
        if num_chunks:
            async for _ in response.aiter_raw():
                num_chunks -= 1
                if not num_chunks:
                    break

    async def _come_back(self, client: httpx2.AsyncClient, response: httpx2.Response) -> None:
        """Close the first connection after some events and resume the stream."""
        seen, last_id, num_events = "", "0", self.rng.randint(1, 5)
        async for event in httpx2.EventSource(response):
            last_id, num_events = event.id, num_events - 1
            if event.event == "token":
                seen += json.loads(event.data)["text"]
            if not num_events or event.event in ("done", "error"):
                break
        await response.aclose()
        url = f"/requests/{response.headers['x-chatstream-request-id']}/stream"
        async with client.stream("GET", url, headers={"last-event-id": last_id}) as rest:
            if rest.status_code == 200:
                await self._read(rest, seen)
            else:
                assert rest.status_code in (204, 404)  # already read to the end, or expired on a slow machine
                self.outcomes["nothing left" if rest.status_code == 204 else "too late"] += 1

    async def _break_off(self, *, whole: bool) -> None:
        """Send a request or half of one, and abort the connection with unread data."""
        host, port = self.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"user_input": "x"})
        request = (
            f"POST /chat_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"accept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()
        writer.write(request if whole else request[: self.rng.randrange(1, len(request))])
        await writer.drain()
        if whole:
            await reader.read(1)
        await asyncio.sleep(self.rng.uniform(0.0, 0.02))
        writer.transport.abort()
        self.outcomes["broke off"] += 1


def num_open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))
