"""One server with its clients, operator and faults, in virtual time and in a task order drawn from the seed.

Real: the scheduler, the worker, the streams, `ChatStream`, the ASGI application and uvicorn's HTTP protocol. Simulated:
the sockets (network.py) and the engine (engine.py). After a run nothing may be left behind, and the responses and the
event log must be possible.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate
from typing import Any, ClassVar
from unittest.mock import patch

import uvicorn
from anyio._backends._asyncio import CancelScope
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from chatstream import ChatStream, RuntimeSettings, SchedulerSettings
from chatstream.api.app import create_app
from chatstream.errors import ConfigError
from chatstream.legacy import FINISH_TOKEN
from chatstream.scheduler import Grant, Outcome, Scheduler
from chatstream.scheduler import events as ev
from chatstream.scheduler.policies import QUEUES, fair
from chatstream.sessions import Conversation, MemoryStore
from chatstream.testing import History, ShuffledLoop
from tests.reliability.engine import UnreliableEngine
from tests.reliability.faults import FAULT_POINTS, Faults
from tests.reliability.http_client import Broken, Exchange
from tests.reliability.network import connect

DURATION_S = 20.0
"""All requests arrive within this time."""
PATIENCE_S = 600.0
"""Maximum time until all clients have their answers, and from the last fault until everything has ended. Every time
limit of the server is a few seconds, and the longest one of the kernel is `network.KEEPALIVE_S`."""
NOTICE_S = 0.5
"""Maximum time until the server notices a closed connection: the network, and a few iterations of the event loop."""
SLOW = frozenset(
    {
        "engine hangs", "engine is deaf", "slow step", "cannot preempt", "cannot resume", "cancelled inside finally",
        "engine swap", "SIGTERM", "slow preparation", "store is slow", "log sink blocks", "garbage collection",
        "loop is blocked", "clock step",
    }
)  # fmt: skip
"""Without one of these faults the watchdog never reclaims a slot."""


class Misbehaviour(AssertionError):
    """A promise was broken."""


def require(holds: object, promise: str, *details: object) -> None:
    if not holds:
        raise Misbehaviour(f"{promise}: {' '.join(map(repr, details))}")


class UnreliableStore:
    """A conversation store in memory that is slow or fails with a fault."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._store = MemoryStore()

    async def load(self, key: str) -> Conversation:
        await self._be_unreliable()
        return await self._store.load(key)

    async def save(self, key: str, conversation: Conversation) -> None:
        await self._be_unreliable()
        await self._store.save(key, conversation)

    async def delete(self, key: str) -> bool:
        await self._be_unreliable()
        return await self._store.delete(key)

    async def _be_unreliable(self) -> None:
        if self._faults.strikes("store is slow"):
            await asyncio.sleep(self._faults.rng("store is slow").uniform(0.1, 5.0))
        if self._faults.strikes("store fails"):
            raise OSError(errno.EMFILE, "too many open files")


class World:
    """`await World(seed).run()` raises if a promise is broken. Equal seeds give equal digests in every process."""

    def __init__(self, seed: int, *, num_requests: int = 10, faults: Collection[str] | None = None) -> None:
        self.rng = random.Random(f"{seed}:world")
        self.seed = seed
        self.num_requests = num_requests
        self.faults = Faults(seed, faults_of(seed) if faults is None else faults)
        self._patches = ExitStack()
        self._patches.enter_context(_counting_forgotten_clients(self.faults))
        self._patches.enter_context(_cancelling_in_order())
        self.engine = UnreliableEngine(seed, self.faults)
        self.policy = self.rng.choice(["fcfs", *QUEUES])
        if "client table overflows" in self.faults:
            self.policy = "fair"
        self.settings = self._draw_settings()
        self.runtime = RuntimeSettings(
            max_buffered_tokens=self.rng.choice([1, 4, 256]),
            reader_stall_timeout_s=2.0,
            position_interval_s=0.5,
            keepalive_s=1.5,
            resume_grace_s=self.rng.choice([0.0, 3.0, 3.0, 3.0]),
            max_resume_bytes_per_request=self.rng.choice([2_500, 100_000]),
            max_resume_bytes=self.rng.choice([6_000, 200_000]),
        )
        with _catching_schedulers() as schedulers:
            self.chat_stream = ChatStream(
                engine=self.engine,
                scheduler=self.settings,
                runtime=self.runtime,
                sessions=UnreliableStore(self.faults),
                grace_s=1.0,
            )
        (self.scheduler,) = schedulers
        self.log: list[ev.Event] = []
        self.history = History(
            self.settings.max_concurrency,
            self.chat_stream.stats().max_queue_size,
            is_fcfs=self.policy == "fcfs",
            max_running_per_client=self.settings.max_running_per_client,
            has_slices=True,
        )
        self.history_failure: Exception | None = None
        self.unhandled: list[dict[str, Any]] = []
        """Unhandled exceptions reported by the event loop."""
        self.callbacks: Counter[str] = Counter()
        self.seen: list[str] = []
        self.protocols: list[H11Protocol] = []
        self.grants: dict[str, Grant] = {}
        """The latest grant of each live request that has started."""
        self.old_grants: dict[str, Grant] = {}
        self.abandoned: dict[str, float] = {}
        """Requests with a closed connection, and the active time of the disconnect."""
        self.jumped_s = 0.0
        self.active_s: list[float] = []
        """Active time of each event of the log: without the time in which the process was suspended."""

    def _draw_settings(self) -> SchedulerSettings:
        draw = self.rng.choice
        return SchedulerSettings(
            max_concurrency=draw([1, 1, 2, 3]),
            max_queue_size=1 if "queue full at requeue" in self.faults else draw([0, 2, 6, "auto"]),
            policy=self.policy,
            max_running_per_client=draw([None, None, 1]),
            max_waiting_per_client=draw([None, None, 2]),
            max_waiting_tokens=draw([None, None, 1000]),
            max_wait_s=draw([None, None, 3.0]),
            ttft_slo_s=draw([None, None, 5.0]),
            slice_tokens=draw([None, 1, 3]),
            stall_timeout_s=6.0,
            abort_timeout_s=3.0,
        )

    # --- a run ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        with self._patches:
            await self._run()

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, ShuffledLoop)
        self.loop.set_exception_handler(lambda loop, context: self.unhandled.append(context))
        for observer in (self._observe, self._raise, self._block, self._cancel_between_pop_and_start):
            self.chat_stream.observe(observer)
        app = create_app(self.chat_stream)
        app.add_api_route("/mine", self._own_endpoint, methods=["POST"])
        self.config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, timeout_keep_alive=5)
        self.config.load()
        self.state = ServerState()
        await self._start()
        operator = self.loop.create_task(self._operate())
        await self._answer_everybody()
        operator.cancel()
        await asyncio.gather(operator, return_exceptions=True)
        await self._end_well()

    async def _start(self) -> None:
        loading = self.loop.create_task(self.chat_stream.start_queue_worker())
        if self.faults.strikes("shutdown during startup"):
            await asyncio.sleep(self.rng.uniform(0.0, 0.6))
            loading.cancel()
            await self.chat_stream.stop_queue_worker(0.0)
            await asyncio.gather(loading, return_exceptions=True)
            loading = self.loop.create_task(self.chat_stream.start_queue_worker())
        if self.rng.random() < 0.5:  # otherwise the first requests arrive while the engine loads
            await loading

    async def _answer_everybody(self) -> None:
        clients = {self.loop.create_task(Client(self, number).run()) for number in range(self.num_requests)}
        began_s = self.now_s()
        while clients:
            require(self.now_s() - began_s < PATIENCE_S, "every client is answered", self.chat_stream)
            ended, clients = await asyncio.wait(clients, timeout=50.0, return_when=asyncio.FIRST_EXCEPTION)
            for client in ended:
                await client

    def now_s(self) -> float:
        """Return the active time: loop time without suspensions."""
        return self.loop.time() - self.jumped_s

    def _jump(self, seconds: float) -> None:
        self.jumped_s += seconds
        self.loop.jump(seconds)

    async def _end_well(self) -> None:
        """Check liveness: after the last fault everything ends without intervention, and nothing is left."""
        self.faults.is_over = True
        self.engine.heal()
        if not self.chat_stream.stats().is_open:
            await self.chat_stream.start_queue_worker()
        self.chat_stream.set_paused(False)
        began_s = self.now_s()
        while left := self._what_is_left():
            require(self.now_s() - began_s < PATIENCE_S, "everything ends when the faults are over", left)
            await asyncio.sleep(1.0)
        if self.history_failure is not None:
            raise self.history_failure
        self.history.check_complete()
        self._check_counts()
        self._check_times()
        await self.chat_stream.stop_queue_worker(0.0)
        require(self.loop.num_timers == 0, "no timer is left after a stop")
        require(not self.unhandled, "every exception is handled", self.unhandled)

    def _what_is_left(self) -> list[object]:
        stats = self.chat_stream.stats()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        left: dict[str, object] = {
            "running": stats.running,
            "waiting": stats.waiting,
            "preempted": stats.preempted,
            "leaving": stats.leaving,
            **self.chat_stream.records(),
            "generations": self.engine.active | self.engine.preempted,
            "connections": self.state.connections,
            "connection tasks": self.state.tasks,
            "tasks": others,
            "timers": self.loop.num_timers,
        }
        return [f"{what}: {value}" for what, value in left.items() if value]

    def _check_counts(self) -> None:
        stats = self.chat_stream.stats()
        ends = stats.finished + stats.cancelled + stats.failed + stats.expired
        require(stats.received == stats.rejected + ends, "every request is accounted for", stats)
        require(len(self.history.ended) == ends, "every request ends once", stats)
        require(set(self.callbacks.values()) <= {1}, "one callback per request", self.callbacks)
        if not SLOW & set(self.faults.hits):
            require(not stats.slots_reclaimed, "no slot is reclaimed from an engine that is not slow", stats)

    def _check_times(self) -> None:
        """Check the time limits of cancellations and disconnects."""
        aborted_s: dict[str, float] = {}
        after_abort: Counter[str] = Counter()
        is_noticed_late = bool({"slow preparation", "store is slow"} & set(self.faults.hits))
        for event, at_s in zip(self.log, self.active_s, strict=True):
            match event:
                case ev.AbortRequested():
                    aborted_s[event.request_id] = at_s
                case ev.Tokens() if event.request_id in aborted_s:
                    after_abort[event.request_id] += event.num_tokens
                    require(after_abort[event.request_id] <= 1, "at most one token after a cancellation", event)
                case ev.Finished() | ev.Failed() | ev.Cancelled() | ev.Expired():
                    begun_s = aborted_s.get(event.request_id, at_s)
                    require(at_s - begun_s < 3.0 + NOTICE_S, "an aborted request ends within the abort timeout", event)
                    late_s = begun_s - self.abandoned.get(event.request_id, begun_s)
                    require(
                        late_s < NOTICE_S or is_noticed_late, "nothing is generated for a disconnected client", event
                    )

    # --- observers and callbacks ------------------------------------------------------------------------------

    def _observe(self, event: ev.Event) -> None:
        self.log.append(event)
        self.active_s.append(event.at_s - self.jumped_s)
        if isinstance(event, ev.Requeued) and self.history.max_queue_size <= len(self.history.waiting):
            self.faults.hits["queue full at requeue"] += "queue full at requeue" in self.faults
        if isinstance(event, ev.Requeued | ev.Preempted):
            self.old_grants[event.request_id] = event.grant
        elif isinstance(event, ev.Started | ev.Resumed):
            self.grants[event.request_id] = event.grant
            self._report_late(event)
        elif isinstance(event, ev.Finished | ev.Failed | ev.Cancelled | ev.Expired):
            self.grants.pop(event.request_id, None)
        if self.history_failure is None:
            try:
                self.history.feed([event])
            except Exception as failure:
                self.history_failure = failure

    def _report_late(self, event: ev.Started | ev.Resumed) -> None:
        """Send a late engine report of an ended attempt or time slice."""
        grant = self.old_grants.get(event.request_id)
        if grant is None or not self.faults.strikes("late callback"):
            return

        def report() -> None:
            if self.grants.get(grant.request_id) != grant:
                before = self.chat_stream.stats()
                self.scheduler.on_tokens(grant, 1, self.loop.time())
                self.scheduler.on_preempted(grant, self.loop.time())
                self.scheduler.on_ended(grant, Outcome.FAILED, "late", self.loop.time())
                self.chat_stream.set_policy(self.chat_stream.stats().policy)  # applies pending decisions
                require(self.chat_stream.stats().stale_reports == before.stale_reports + 3, "a late report is ignored")

        self.loop.call_later(self.faults.rng("late callback").uniform(0.0, 0.2), report)

    def _raise(self, event: ev.Event) -> None:
        if self.faults.strikes("observer raises"):
            raise self.faults.rng("observer raises").choice([ValueError, asyncio.CancelledError])

    def _block(self, event: ev.Event) -> None:
        if self.faults.strikes("log sink blocks"):
            self._jump(self.faults.rng("log sink blocks").uniform(0.5, 8.0))

    def _cancel_between_pop_and_start(self, event: ev.Event) -> None:
        if isinstance(event, ev.Started) and self.faults.strikes("between pop and start"):
            self.loop.call_soon(partial(self.chat_stream.cancel, event.request_id, by="admin"))

    async def _own_endpoint(self, request: Request) -> Response:
        """An endpoint of the embedding application, with a callback."""
        name = request.headers["x-name"]

        def callback(request: Request, message: str) -> Any:
            self.callbacks[name] += 1
            if self.faults.strikes("callback raises"):
                raise self.faults.rng("callback raises").choice([ValueError("callback"), asyncio.CancelledError()])

        return await self.chat_stream.handle_chat_stream_request(request, callback=callback)

    # --- the operator -----------------------------------------------------------------------------------------

    async def _operate(self) -> None:
        rng = random.Random(f"{self.seed}:operator")
        while True:
            await asyncio.sleep(rng.expovariate(1.0))
            for name, action in self._ACTIONS.items():
                if self.faults.strikes(name):
                    await action(self, self.faults.rng(name))
            self._look()

    def _look(self) -> None:
        """Check the reported ETAs, also right after a jump of the clock."""
        for view in self.chat_stream.requests():
            require(view.eta is None or 0 <= view.eta.p50_s <= view.eta.p90_s, "expected times are possible", view)

    async def _use_wrong_ids(self, rng: random.Random) -> None:
        await self.engine.preempt("unknown")
        self.engine.resume("unknown")
        require(not self.chat_stream.cancel("unknown"), "an unknown request cannot be cancelled")
        for method, path in (("DELETE", "/requests/unknown"), ("GET", "/requests/unknown/stream")):
            exchange = Exchange(self.connect(rng))
            exchange.ask(method, path)
            await self._finish(exchange)

    async def _swap_engine(self, rng: random.Random) -> None:
        await self.engine.stop()
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await self.engine.start()

    async def _cancel_a_task(self, rng: random.Random) -> None:
        generating = [task for task in asyncio.all_tasks() if task.get_name().startswith("chatstream-")]
        tasks = sorted(generating, key=hash)
        # Cancelling an unstarted task of uvicorn would leave its connection open without an answer.
        begun = [task for task in self.state.tasks if getcoroutinestate(task.get_coro()) != CORO_CREATED]
        tasks += sorted(begun, key=hash)
        if tasks:
            rng.choice(tasks).cancel()

    async def _stand_still(self, rng: random.Random) -> None:
        self._jump(1.0)

    async def _block_the_loop(self, rng: random.Random) -> None:
        self._jump(20.0)

    async def _sleep_for_hours(self, rng: random.Random) -> None:
        self._jump(6 * 3600.0)

    async def _shrink_limits(self, rng: random.Random) -> None:
        before = self.chat_stream.stats().max_concurrency
        try:
            self.chat_stream.set_limits(max_concurrency=0)
        except ConfigError:
            require(self.chat_stream.stats().max_concurrency == before, "a refused change has no effect")
        self.chat_stream.set_limits(max_concurrency=1, max_queue_size=0, by="operator")
        await asyncio.sleep(rng.uniform(0.0, 3.0))
        self.chat_stream.set_limits(max_concurrency=rng.choice([1, 2, 4]), max_queue_size=6, by="operator")

    async def _change_policy(self, rng: random.Random) -> None:
        self.chat_stream.set_policy(rng.choice(list(QUEUES)), by="operator")

    async def _pause(self, rng: random.Random) -> None:
        self.chat_stream.set_paused(True, by="operator")
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        self.chat_stream.set_paused(False, by="operator")

    async def _drain_twice(self, rng: random.Random) -> None:
        drains = [self.loop.create_task(self.chat_stream.drain(rng.uniform(0.0, 1.0))) for _ in range(2)]
        await asyncio.gather(*drains)
        await self.chat_stream.start_queue_worker()

    async def _terminate(self, rng: random.Random) -> None:
        """Stop as `chatstream serve` does at a signal, then start again like the next process."""
        for protocol in self.protocols:  # not uvicorn's own set: its order differs between processes
            if protocol in self.state.connections:
                protocol.shutdown()
        await self.chat_stream.drain(rng.choice([0.0, 2.0]))
        await self.chat_stream.stop_queue_worker(0.0)
        require(not self.chat_stream.stats().running, "nothing runs after a stop")
        require(not self.engine.active, "no generation is left after a stop", self.engine.active)
        await self.chat_stream.start_queue_worker()

    _ACTIONS: ClassVar = {
        "wrong ids": _use_wrong_ids,
        "engine swap": _swap_engine,
        "task is cancelled": _cancel_a_task,
        "garbage collection": _stand_still,
        "loop is blocked": _block_the_loop,
        "clock step": _sleep_for_hours,
        "limit shrinks": _shrink_limits,
        "policy changes": _change_policy,
        "intake pauses": _pause,
        "double drain": _drain_twice,
        "SIGTERM": _terminate,
    }

    # --- connections of clients -------------------------------------------------------------------------------

    def connect(self, rng: random.Random, name: str = "127.0.0.1", *, window: int = 65536) -> Any:
        self.protocols.append(H11Protocol(self.config, self.state, {}, self.loop))
        return connect(
            lambda: self.protocols[-1],
            rng,
            high_water=self.rng.choice([64, 65536]),
            window=window,
            user_timeout_s=2.0 + 5.0,
            name=name,
        )

    async def _finish(self, exchange: Exchange) -> int:
        try:
            await exchange.head()
            await exchange.body()
        except Broken:
            pass
        exchange.peer.close()
        return exchange.status

    def digest(self) -> str:
        """Return a hash of the event log and all responses, without the random ids."""
        numbers: dict[str, str] = {}

        def number(found: re.Match[str]) -> str:
            return numbers.setdefault(found[0], f"#{len(numbers)}")

        text = "\n".join([*map(repr, self.log), *sorted(self.seen)])
        return hashlib.sha256(_RANDOM_ID.sub(number, text).encode()).hexdigest()


_RANDOM_ID = re.compile(r"\b[0-9a-f]{32}\b|(?<=')[\w-]{22}(?=/')")
"""The id of a request, or of a browser session without a cookie."""


class Client:
    """A client with one request and a possibly faulty connection."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.faults = world.faults
        self.rng = random.Random(f"{world.seed}:client:{number}")
        self.name = f"c{number}"
        self.address = f"10.0.0.{self.rng.randrange(4)}"
        self.dialect = self.rng.choice(
            ["sse", "sse", "sse", "resumable", "resumable", "legacy", "mine", "chunks", "whole"]
        )
        if self.dialect == "resumable" and not world.runtime.resume_grace_s:
            self.dialect = "sse"
        self.request_id = ""
        self.text = ""
        self.last_id = ""
        self.ends: list[str] = []
        self.has_left = False

    async def run(self) -> None:
        rng = self.rng
        await asyncio.sleep(rng.choice([0.0, 5.0, 5.0, rng.uniform(0.0, DURATION_S)]))
        is_slow, stalls = self.faults.strikes("slow reader"), self.faults.strikes("reader stalls")
        peer = self.world.connect(rng, self.address, window=32 if is_slow or stalls else 65536)
        exchange = Exchange(peer)
        try:
            await self._talk(exchange, is_slow=is_slow, stalls=stalls)
        except Broken:
            self.ends.append("broken")
        while self.dialect == "resumable" and self.request_id and self.ends[-1:] == ["broken"]:
            await self._come_back()
        self._check()
        if not peer.has_vanished:
            peer.close()

    def _request(self) -> tuple[str, dict[str, Any], dict[str, str]]:
        rng, headers = self.rng, {"x-name": self.name}
        if rng.random() < 0.5:
            response, stranger = Response(), Request({"type": "http", "path": "/", "headers": []})
            self.world.chat_stream.access.set_session(response, stranger, f"session-{rng.randrange(3)}")
            headers |= {"cookie": response.headers["set-cookie"].split(";")[0]}
        if self.dialect in ("chunks", "whole"):
            messages = [{"role": "user", "content": self.name}]
            body = {"model": "fake", "messages": messages, "stream": self.dialect == "chunks"}
            return "/v1/chat/completions", body, headers
        if self.dialect != "legacy":
            headers["accept"] = "text/event-stream"
        body = {"user_input": self.name, "priority": rng.choice([-2, 0, 0, 3])}
        if rng.random() < 0.2:
            body["max_wait_seconds"] = 1.0
        if self.dialect == "resumable":
            body["resumable"] = True
        return "/mine" if self.dialect == "mine" else "/chat_stream", body, headers

    async def _talk(self, exchange: Exchange, *, is_slow: bool, stalls: bool) -> None:
        path, body, headers = self._request()
        if self.faults.strikes("request stalls"):
            sent = exchange.request_bytes("POST", path, body, headers)
            exchange.peer.send(sent[: self.faults.rng("request stalls").randrange(1, len(sent))])
            await asyncio.sleep(20.0)
            exchange.peer.reset()
            return
        exchange.ask("POST", path, body, headers)
        if self.faults.strikes("disconnect in line"):
            await self._disconnect(exchange, self.faults.rng("disconnect in line").uniform(0.0, 2.0))
            return
        if self.faults.strikes("peer vanishes"):
            self.world.loop.call_later(self.faults.rng("peer vanishes").uniform(0.0, 2.0), exchange.peer.vanish)
        await exchange.head()
        self.request_id = exchange.headers.get("x-chatstream-request-id", "")
        if exchange.status != 200:
            self.ends.append(f"{exchange.status} {(await exchange.body()).decode()}")
            return
        if self.rng.random() < 0.2:
            self.world.loop.create_task(self._cancel_by_id())
        await self._read(exchange, is_slow=is_slow, stalls=stalls)

    async def _read(self, exchange: Exchange, *, is_slow: bool = False, stalls: bool = False) -> None:
        if self.dialect == "legacy":
            body = (await exchange.body()).decode()
            self.text = body.split(FINISH_TOKEN)[-2]
            self.ends.append("done")
        elif self.dialect == "whole":
            self.text = (await exchange.json())["choices"][0]["message"]["content"]
            self.ends.append("done")
        else:
            async for event in exchange.sse():
                self._take(event.kind, event.data, event.id)
                if is_slow:
                    await asyncio.sleep(self.rng.uniform(0.0, 0.5))
                if stalls:
                    await asyncio.sleep(20.0)
                if event.kind != "queued" and self.faults.strikes("disconnect at a write"):
                    exchange.peer.reset()
                    self._abandon()
                elif self.dialect == "resumable" and self.faults.strikes("change of networks"):
                    exchange.peer.reset()

    def _take(self, kind: str, data: str, event_id: str) -> None:
        require(not self.ends or self.ends == ["broken"], "no event follows the end", self.ends, data)
        self.last_id = event_id or self.last_id
        if self.dialect != "chunks":
            if kind == "token":
                self.text += json.loads(data)["text"]
            elif kind in ("done", "error"):
                self.ends.append(kind)
        elif data == "[DONE]":
            self.ends.append("done")
        elif "error" in (chunk := json.loads(data)):
            self.ends.append("error")
        elif chunk["choices"]:
            self.text += chunk["choices"][0]["delta"].get("content") or ""

    async def _disconnect(self, exchange: Exchange, after_s: float) -> None:
        self.has_left = True
        await asyncio.sleep(after_s)
        if exchange.peer.num_unread and await exchange.head() == 200:
            self.request_id = exchange.headers["x-chatstream-request-id"]
            self._abandon()
        if self.rng.random() < 0.5:
            exchange.peer.close()
        else:
            exchange.peer.reset()

    def _abandon(self) -> None:
        if self.dialect != "resumable":
            self.world.abandoned[self.request_id] = self.world.now_s()

    async def _cancel_by_id(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        for _ in range(2):
            exchange = Exchange(self.world.connect(self.rng, self.address))
            exchange.ask("DELETE", f"/requests/{self.request_id}")
            await self.world._finish(exchange)

    async def _come_back(self) -> None:
        """Reconnect, sometimes in time, sometimes twice at the same time."""
        await asyncio.sleep(self.rng.choice([0.0, 0.5, 0.5, 6.0]))
        exchange = Exchange(self.world.connect(self.rng, self.address))
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        exchange.ask("GET", f"/requests/{self.request_id}/stream", None, headers)
        if self.rng.random() < 0.2:
            other = Exchange(self.world.connect(self.rng, self.address))
            other.ask("GET", f"/requests/{self.request_id}/stream", None, headers)
            self.world.loop.create_task(self.world._finish(other))
        try:
            if await exchange.head() == 200:
                self.ends = []
                await self._read(exchange)
            else:
                self.ends.append(f"{exchange.status} when it came back")
        except Broken:
            self.ends.append("broken")
        exchange.peer.close()

    def _check(self) -> None:
        self.world.seen.append(f"{self.name} {self.ends} {self.text}")
        require(sum(end in ("done", "error") for end in self.ends) <= 1, "at most one end", self.name, self.ends)
        generated = "".join(self.world.engine.generated.get(self.request_id, []))
        if self.dialect == "legacy":
            generated = generated.strip() if "done" in self.ends else generated
        require(generated.startswith(self.text), "the received text is a prefix of the answer", self.text, generated)
        if "done" in self.ends:
            require(self.text == generated, "a complete answer has all of its text", self.text, generated)


class _InOrder(dict[Any, None]):
    """A set in insertion order, independent of addresses."""

    def add(self, member: object) -> None:
        self[member] = None

    def discard(self, member: object) -> None:
        self.pop(member, None)

    def remove(self, member: object) -> None:
        del self[member]


@contextmanager
def _cancelling_in_order() -> Iterator[None]:
    """Make the cancellation order of anyio deterministic: its set is ordered by addresses, which differ per process."""
    make = CancelScope.__init__

    def make_in_order(self: CancelScope, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self._child_scopes = _InOrder()  # type: ignore[assignment]

    CancelScope.__init__ = make_in_order  # type: ignore[method-assign]
    try:
        yield
    finally:
        CancelScope.__init__ = make  # type: ignore[method-assign]


@contextmanager
def _catching_schedulers() -> Iterator[list[Scheduler]]:
    """Collect the created schedulers, so that a late report can bypass the runtime."""
    made: list[Scheduler] = []

    class Caught(Scheduler):
        def __init__(self, settings: SchedulerSettings) -> None:
            super().__init__(settings)
            made.append(self)

    with patch("chatstream.chat_stream.Scheduler", Caught):
        yield made


@contextmanager
def _counting_forgotten_clients(faults: Faults) -> Iterator[None]:
    """Limit the fair policy to one idle client, if this run has that fault."""

    class Forgetful(fair.FairQueue):
        def _forget_idle(self) -> None:
            faults.hits["client table overflows"] += 1
            super()._forget_idle()

    if "client table overflows" not in faults:
        yield
        return
    before, most = QUEUES["fair"], fair.MAX_IDLE_CLIENTS
    QUEUES["fair"] = lambda settings: Forgetful(settings.client_weights)
    fair.MAX_IDLE_CLIENTS = 1
    try:
        yield
    finally:
        QUEUES["fair"], fair.MAX_IDLE_CLIENTS = before, most


def faults_of(seed: int) -> set[str]:
    """Draw the faults of a run: few in some runs and nearly all in others, so that they occur alone and combined."""
    rng = random.Random(f"{seed}:faults")
    share = rng.choice([0.05, 0.1, 0.2, 0.5, 0.9])
    return {name for name in FAULT_POINTS if rng.random() < share}


def run_world(seed: int, *, num_requests: int = 10, faults: Collection[str] | None = None) -> World:
    """Run one world in a new event loop. Raises `Misbehaviour` or any other exception of the run."""
    worlds: list[World] = []

    async def main() -> None:
        worlds.append(World(seed, num_requests=num_requests, faults=faults))
        await worlds[0].run()

    random.seed(seed)  # Retry-After is jittered
    with asyncio.Runner(loop_factory=lambda: ShuffledLoop(seed)) as runner:
        runner.run(main())
    return worlds[0]
