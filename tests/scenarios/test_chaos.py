"""Everything that can go wrong, thousands of times: nothing leaks, everybody gets exactly one end.

10,000 requests in virtual time, then 2,000 over real sockets, with random arrivals, clients that leave while they
wait and while they stream, cancels by id, slow and dead readers, and an engine that raises, hangs, gets lost,
ends too early and cancels itself. The seed is in the test's name: the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from chatstream import ChatStream, RuntimeSettings, SchedulerSettings
from chatstream.errors import EngineUnavailable, Overloaded
from chatstream.runtime import RequestStream
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault, run_virtual
from chatstream.testing.fake_engine import Step
from chatstream.types import Done, Failed, GenerationRequest
from tests.e2e.server import Server, serve
from tests.runtime.house import House

FAULTS: dict[str, list[Step]] = {
    "raises": [RuntimeError("boom")],
    "is lost": [EngineUnavailable("lost")],
    "hangs": [Fault.HANG],
}


def random_script(rng: random.Random, fault_share: float) -> list[Step]:
    """Mostly an answer; sometimes one that breaks off at a random place, or that never begins."""
    answer: list[Step] = [f"t{n} " for n in range(rng.randint(1, 12))]
    if rng.random() >= fault_share:
        return answer
    kind = rng.choice([*FAULTS, "is lost", "is empty"])
    if kind in ("is lost", "is empty"):
        answer = answer[: rng.choice([0, 0, 1])]
    return answer[: rng.randint(0, len(answer))] + FAULTS.get(kind, [])


class Chaos:
    """One run of the shell in virtual time."""

    def __init__(self, seed: int, num_requests: int) -> None:
        self.rng = random.Random(seed)
        self.num_requests = num_requests
        self.scripts: dict[str, list[Step]] = {}
        self.seen: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.house = House(
            FakeEngine(lambda r: self.scripts[r.request_id], step_s=0.02, prefill_s=0.01),
            max_concurrency=4,
            max_queue_size=30,
            stall_timeout_s=10.0,
            abort_timeout_s=5.0,
            runtime=RuntimeSettings(max_buffered_tokens=4, reader_stall_timeout_s=3.0),
        )

    async def run(self) -> None:
        clients = []
        for n in range(self.num_requests):
            # Bursts and lulls around what four slots can do.
            await asyncio.sleep(self.rng.expovariate(6.0) if self.rng.random() < 0.9 else 0.0)
            clients.append(asyncio.create_task(self.client(f"r{n}")))
            if self.rng.random() < 0.001:
                self.house.worker.set_limits(max_concurrency=self.rng.randint(1, 6), by="chaos")
        await asyncio.gather(*clients)
        await asyncio.sleep(60.0)
        await self.house.check_nothing_is_left()

    async def client(self, request_id: str) -> None:
        rng = self.rng
        self.scripts[request_id] = random_script(rng, fault_share=0.1)
        try:
            stream = self.house.submit(
                request_id,
                client=f"c{rng.randint(0, 20)}",
                conversation=rng.choice([None, None, None, f"k{rng.randint(0, 5)}"]),
                max_wait_s=rng.choice([None, None, 2.0, 10.0]),
            )
        except Overloaded as refusal:
            self.outcomes[refusal.code] += 1
            return
        behaviour = rng.choice(["reads", "reads", "reads", "leaves", "is slow", "is dead", "is cancelled"])
        if behaviour == "is cancelled":
            asyncio.get_running_loop().call_later(rng.uniform(0, 3), self.house.worker.cancel, request_id)
        if behaviour == "is dead":
            await asyncio.sleep(rng.uniform(5, 50))
        if behaviour == "leaves":
            try:
                async with asyncio.timeout(rng.uniform(0, 1.5)):
                    await self.read(stream, pause_s=0.0)
            except TimeoutError:
                stream.close()
            return
        await self.read(stream, pause_s=rng.uniform(0, 0.5) if behaviour == "is slow" else 0.0)

    async def read(self, stream: RequestStream, pause_s: float) -> None:
        self.seen[stream.request_id] = ""
        ends = 0
        async for event in stream:
            assert not ends, "nothing comes after the end"
            if event.type == "token":
                self.seen[stream.request_id] += event.text
                await asyncio.sleep(pause_s)
            elif isinstance(event, Done | Failed):
                ends += 1
                self.outcomes[event.type if isinstance(event, Done) else event.error.code] += 1
        assert ends == 1

    def digest(self) -> str:
        return hashlib.sha256("\n".join(map(repr, self.house.log)).encode()).hexdigest()


def chaos(seed: int, num_requests: int) -> Chaos:
    run: list[Chaos] = []

    async def main() -> None:
        run.append(Chaos(seed, num_requests))
        await run[0].run()

    run_virtual(main())
    return run[0]


def test_ten_thousand_requests_in_virtual_time_leak_nothing() -> None:
    run = chaos(seed=1, num_requests=10_000)
    house = run.house
    for request_id, seen in run.seen.items():
        assert "".join(house.engine.generated.get(request_id, [])).startswith(seen)
    stats = house.worker.stats()
    assert stats.received == 10_000
    assert stats.received == stats.rejected + stats.finished + stats.cancelled + stats.failed + stats.expired
    # It was chaos indeed: every kind of end occurred, and often.
    assert stats.finished > 3_000
    assert min(stats.rejected, stats.cancelled, stats.failed, stats.expired, stats.requeued) > 100
    assert stats.slots_reclaimed > 100
    assert set(run.outcomes) >= {"done", "cancelled", "engine_error", "engine_unavailable", "queue_full"}


@pytest.mark.parametrize("seed", range(2, 6))
def test_the_same_seed_gives_the_same_log(seed: int) -> None:
    assert chaos(seed, 300).digest() == chaos(seed, 300).digest()


# --- over real sockets ----------------------------------------------------------------------------------------------


class SocketChaos:
    """Clients of every kind against a real server."""

    def __init__(self, server: Server, engine: FakeEngine, seed: int) -> None:
        self.server = server
        self.engine = engine
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()

    async def run(self, num_requests: int, at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=at_once)
        async with self.server.client(limits=limits) as client:

            async def one(n: int) -> None:
                async with gate:
                    await self.client(client, n)

            await asyncio.gather(*(one(n) for n in range(num_requests)))

    async def client(self, client: httpx2.AsyncClient, n: int) -> None:
        behaviour = self.rng.choice(
            ["reads", "reads", "reads", "reads old", "asks openai", "leaves", "leaves", "cancels"]
        )
        if behaviour == "asks openai":
            body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
            response = await client.post("/v1/chat/completions", json=body)
            self.outcomes[f"openai {response.status_code}"] += 1
            return
        headers = {"x-chatstream-conversation": str(n)}
        if behaviour != "reads old":
            headers["accept"] = "text/event-stream"
        request = client.build_request("POST", "/chat_stream", json={"user_input": "x"}, headers=headers)
        response = await client.send(request, stream=True)
        try:
            if response.status_code != 200:
                self.outcomes[f"refused {response.status_code}"] += 1
                await response.aread()
            elif behaviour == "leaves":
                await self.read_some(response)
            elif behaviour == "reads old":
                await self.read_old(response)
            else:
                if behaviour == "cancels":
                    request_id = response.headers["x-chatstream-request-id"]
                    assert (await client.delete(f"/requests/{request_id}")).status_code == 204
                    assert (await client.delete(f"/requests/{request_id}")).status_code == 204
                await self.read(response)
        finally:
            await response.aclose()

    async def read(self, response: httpx2.Response) -> None:
        events = [event async for event in httpx2.EventSource(response)]
        ends = [event for event in events if event.event in ("done", "error")]
        assert len(ends) == 1
        assert events[-1] is ends[0]
        text = "".join(json.loads(event.data)["text"] for event in events if event.event == "token")
        generated = "".join(self.engine.generated.get(response.headers["x-chatstream-request-id"], []))
        assert generated.startswith(text)
        if ends[0].event == "done":
            assert text == generated
        self.outcomes[ends[0].event] += 1

    async def read_old(self, response: httpx2.Response) -> None:
        try:
            body = (await response.aread()).decode()
        except httpx2.RemoteProtocolError:
            self.outcomes["old broken"] += 1  # the only way the old format can say that an answer failed
            return
        generated = "".join(self.engine.generated[response.headers["x-chatstream-request-id"]])
        assert body.split("<::EOS::>")[-2] == generated.strip()
        self.outcomes["old done"] += 1

    async def read_some(self, response: httpx2.Response) -> None:
        num_chunks = self.rng.randint(0, 4)
        if num_chunks:
            async for _ in response.aiter_raw():
                num_chunks -= 1
                if not num_chunks:
                    break
        self.outcomes["left"] += 1


def num_open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@pytest.mark.anyio
async def test_two_thousand_requests_over_real_sockets_leak_nothing() -> None:
    rng = random.Random(7)
    scripts: dict[str, Sequence[Step]] = {}

    def script(request: GenerationRequest) -> Sequence[Step]:
        return scripts.setdefault(request.request_id, random_script(rng, fault_share=0.05))

    engine = FakeEngine(script, step_s=0.001)
    chat_stream = ChatStream(
        engine=engine,
        max_concurrency=4,
        max_queue_size=40,
        max_wait_s=5.0,
        scheduler=SchedulerSettings(stall_timeout_s=0.2, abort_timeout_s=5.0),
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serve(chat_stream) as server:
        files_before = num_open_files()
        run = SocketChaos(server, engine, seed=8)
        await run.run(2_000, at_once=min(60, soft // 4))
        await server.until_idle()
        assert not engine.active
        await server.until(lambda: num_open_files() <= files_before + 2)
    stats = chat_stream.stats()
    assert stats.received == stats.rejected + stats.finished + stats.cancelled + stats.failed + stats.expired
    assert sum(run.outcomes.values()) == 2_000
    ends = Counter(
        e.request_id for e in server.log if isinstance(e, ev.Finished | ev.Cancelled | ev.Failed | ev.Expired)
    )
    assert set(ends.values()) == {1}
    assert min(run.outcomes[kind] for kind in ("done", "error", "left", "old done", "old broken", "openai 200")) > 5
    assert server.history.peak_running == 4
