"""`GET /metrics`: all values are correct for every outcome of a request, in virtual time."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from chatstream import AccessSettings, ChatRequest, ChatStream, Message, SchedulerSettings
from chatstream.errors import EngineUnavailable, Overloaded, PromptTooLong
from chatstream.metrics import definitions
from chatstream.metrics.definitions import REJECTION_CODES, Counter, Definition, Gauge, Histogram
from chatstream.metrics.recorder import Distribution, Recorder
from chatstream.scheduler import Grant
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault
from chatstream.testing.fake_engine import Step
from chatstream.types import GenerationRequest
from tests.api.in_process import SSE, STEP_S, Raw, Service, ask, open_service, script
from tests.api.test_native import in_virtual_time
from tests.engines.process.steered import Steered

HELLO = {"user_input": "hello"}
PAGE = Path(__file__).parent.parent / "docs/metrics.md"

PROMISED = {
    "chatstream_requests_running": "gauge",
    "chatstream_requests_waiting": "gauge",
    "chatstream_max_concurrency": "gauge",
    "chatstream_max_queue_size": "gauge",
    "chatstream_requests_total{outcome}": "counter",
    "chatstream_rejections_total{code}": "counter",
    "chatstream_queue_time_seconds": "histogram",
    "chatstream_time_to_first_token_seconds": "histogram",
    "chatstream_inter_token_latency_seconds": "histogram",
    "chatstream_request_duration_seconds": "histogram",
    "chatstream_prompt_tokens_total": "counter",
    "chatstream_generated_tokens_total": "counter",
    "chatstream_eta_error_seconds": "histogram",
    "chatstream_slots_reclaimed_total": "counter",
}
"""Metrics of the public contract; the others may change."""
OTHERS = {
    "chatstream_requests_preempted": "gauge",
    "chatstream_paused": "gauge",
    "chatstream_draining": "gauge",
    "chatstream_preemptions_total": "counter",
    "chatstream_requeues_total": "counter",
    "chatstream_limit_changes_total{source}": "counter",
    "chatstream_preempted_time_seconds": "histogram",
    "chatstream_engine_slots": "gauge",
    "chatstream_prefix_cache_bytes": "gauge",
    "chatstream_reused_prompt_tokens_total": "counter",
}


class Scrape:
    """The samples of one scrape, by name and labels: `chatstream_requests_total{outcome="failed"}`."""

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        self.samples: dict[str, float] = {}
        for family in parse_text(text):
            names: set[str] = set()
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                self.samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
                names.add(",".join(sample.labels.keys() - {"le"}))
            [label] = names
            name = family.name + ("_total" if family.type == "counter" else "")
            self.kinds[name + (f"{{{label}}}" if label else "")] = family.type

    def __getitem__(self, short: str) -> float:
        return self.samples[f"chatstream_{short}"]

    @property
    def outcomes(self) -> dict[str, int]:
        """Outcomes with a count above 0."""
        return self._by_label("requests_total", "outcome")

    @property
    def rejections(self) -> dict[str, int]:
        return self._by_label("rejections_total", "code")

    def _by_label(self, name: str, label: str) -> dict[str, int]:
        pattern = rf'chatstream_{name}{{{label}="(\w+)"}}'
        found = [(re.fullmatch(pattern, sample), value) for sample, value in self.samples.items()]
        return {match[1]: int(value) for match, value in found if match and value}

    def times(self, name: str) -> tuple[int, object]:
        """Count, and sum in seconds."""
        return int(self[f"{name}_seconds_count"]), pytest.approx(self[f"{name}_seconds_sum"])

    def up_to(self, name: str, bound: str) -> int:
        return int(self[f'{name}_seconds_bucket{{le="{bound}"}}'])


async def scrape(service: Service) -> Scrape:
    response = await service.browser().get("/metrics")
    assert response.status_code == 200
    return Scrape(response.text)


def all_definitions() -> list[Definition]:
    return [value for value in vars(definitions).values() if isinstance(value, Gauge | Counter | Histogram)]


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_metrics_have_the_promised_names_kinds_and_labels() -> None:
    async with ChatStream() as chat_stream:
        page = Scrape(chat_stream.metrics.page()[0].decode())
    assert page.kinds == PROMISED | OTHERS


@pytest.mark.anyio
async def test_every_defined_metric_is_exported_with_its_help() -> None:
    async with ChatStream() as chat_stream:
        text = chat_stream.metrics.page()[0].decode()
    for definition in all_definitions():
        assert f"# HELP {definition.name} {definition.help}\n" in text


@pytest.mark.anyio
async def test_a_metric_that_the_engine_does_not_report_is_missing() -> None:
    async with open_service() as service:  # with the mock, which reports only its slots
        page = Scrape((await service.browser().get("/metrics")).text)
    assert page.kinds.keys() == (PROMISED | OTHERS).keys() - {
        "chatstream_prefix_cache_bytes", "chatstream_reused_prompt_tokens_total"
    }  # fmt: skip


def test_without_engine_stats_no_engine_metric_is_exported(tmp_path: Path) -> None:
    chat_stream = ChatStream(engine=Steered(str(tmp_path)))
    assert chat_stream.engine_stats() is None
    page = Scrape(chat_stream.metrics.page()[0].decode())
    assert page.kinds.keys() == (PROMISED | OTHERS).keys() - {
        "chatstream_engine_slots", "chatstream_prefix_cache_bytes", "chatstream_reused_prompt_tokens_total"
    }  # fmt: skip


@pytest.mark.anyio
async def test_reused_prompt_tokens_and_prefix_cache_bytes_are_exported() -> None:
    async with ChatStream(max_concurrency=1) as chat_stream:
        for _ in range(2):
            _ = [event async for event in chat_stream.stream("What is a slot? " * 5, max_new_tokens=5)]
        page = Scrape(chat_stream.metrics.page()[0].decode())
        stats = chat_stream.engine_stats()
    assert stats is not None
    assert stats.prompt_tokens is not None
    assert stats.prefix_cache_bytes is not None
    assert page.samples["chatstream_prompt_tokens_total"] == stats.prompt_tokens
    assert 0 < page.samples["chatstream_reused_prompt_tokens_total"] == stats.reused_prompt_tokens < stats.prompt_tokens
    assert page.samples["chatstream_prefix_cache_bytes"] == stats.prefix_cache_bytes > 0
    assert page.samples["chatstream_engine_slots"] == 0


@in_virtual_time
async def test_the_format_is_the_one_that_the_scraper_requests() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "hello")
        plain = await browser.get("/metrics")
        assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        accept = {"accept": "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"}
        modern = await browser.get("/metrics", headers=accept)
        assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
        families = {family.name: family for family in parse_openmetrics(modern.text)}
        assert families["chatstream_queue_time_seconds"].unit == "seconds"
        values = {s.name + str(s.labels): s.value for family in families.values() for s in family.samples}
        assert values == {s.name + str(s.labels): s.value for family in parse_text(plain.text) for s in family.samples}


@in_virtual_time
async def test_a_head_request_is_answered() -> None:
    async with open_service() as service:
        head = await service.browser().head("/metrics")
        assert (head.status_code, head.headers["content-type"][:10]) == (200, "text/plain")


@in_virtual_time
async def test_the_metrics_need_no_key() -> None:
    async with open_service(access=AccessSettings(api_keys=("k",), admin_key="a")) as service:
        stranger = service.browser(client=("203.0.113.7", 50000))
        assert (await stranger.post("/chat_stream", json=HELLO)).status_code == 401
        page = await stranger.get("/metrics")
        assert page.status_code == 200
        assert Scrape(page.text).outcomes == {}, "a request refused for its key never reached the queue"


@in_virtual_time
async def test_the_page_does_not_grow_with_requests_and_clients() -> None:
    def samples(page: Scrape) -> set[str]:
        return set(page.samples)

    async with open_service(n=4) as service:
        before = samples(await scrape(service))
        for number in range(50):
            await ask(service.browser(client=(f"203.0.113.{number}", 50000)), "hello")
        await service.browser().patch("/queue", json={"max_queue_size": 9, "reason": "a new label value?"})
        assert samples(await scrape(service)) == before


def test_every_rejection_code_is_exported_from_the_start() -> None:
    later = {"queue_timeout", "engine_unavailable"}  # these end an admitted request
    assert set(REJECTION_CODES) == {error.code for error in Overloaded.__subclasses__()} - later


# --- several instances, and an application's metrics ------------------------------------------------------------------


@in_virtual_time
async def test_two_instances_count_separately_and_touch_no_global_registry() -> None:
    before = generate_latest(REGISTRY)
    async with open_service() as one, open_service() as other:
        await ask(one.browser(), "hello")
        assert (await scrape(one)).outcomes == {"finished": 1}
        assert (await scrape(other)).outcomes == {}
    assert b"chatstream" not in before + generate_latest(REGISTRY)


@in_virtual_time
async def test_an_application_can_export_them_with_its_own_metrics() -> None:
    async with open_service() as service:
        registry = CollectorRegistry(auto_describe=True)
        LibraryHistogram("own_seconds", "The application's.", registry=registry).observe(1)
        registry.register(service.chat_stream.metrics)
        await ask(service.browser(), "hello")
        page = Scrape(generate_latest(registry).decode())
        assert page.samples["own_seconds_count"] == 1
        assert page.outcomes == {"finished": 1}
        with pytest.raises(ValueError, match="Duplicated"):  # no label distinguishes them
            registry.register(ChatStream(engine=FakeEngine()).metrics)


# --- every outcome of a request --------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_complete_answer_is_counted_and_timed() -> None:
    async with open_service(n=1) as service:
        await ask(service.browser(), "hello")
        page = await scrape(service)
        assert page.outcomes == {"finished": 1}
        assert (page["prompt_tokens_total"], page["generated_tokens_total"]) == (1, 3)
        assert page.times("queue_time") == (1, 0.0)
        assert page.times("time_to_first_token") == (1, STEP_S)
        assert page.times("inter_token_latency") == (2, 2 * STEP_S)
        assert page.times("request_duration") == (1, 3 * STEP_S)


@in_virtual_time
async def test_the_wait_is_part_of_the_time_to_first_token_and_of_the_duration() -> None:
    async with open_service(n=1) as service:
        async with (
            Raw(service.app, "/chat_stream", HELLO, headers=SSE),
            Raw(service.app, "/chat_stream", HELLO, headers=SSE) as second,
        ):
            await asyncio.sleep(0.05)
            page = await scrape(service)
            assert (page["requests_running"], page["requests_waiting"]) == (1, 1)
            assert (page["max_concurrency"], page["max_queue_size"]) == (1, 5)
            await second.until(lambda: second.is_complete)
        page = await scrape(service)
        assert (page["requests_running"], page["requests_waiting"]) == (0, 0)
        assert page.times("queue_time") == (2, 0.3)
        assert page.times("time_to_first_token") == (2, 0.1 + 0.4)
        assert page.times("inter_token_latency") == (4, 0.4)
        assert page.times("request_duration") == (2, 0.3 + 0.6)
        assert (page.up_to("queue_time", "0.01"), page.up_to("queue_time", "0.5")) == (1, 2)


@in_virtual_time
async def test_cancelled_while_waiting_and_while_running() -> None:
    async with open_service(n=1) as service:
        running, waiting = await service.occupy(2)
        await asyncio.sleep(1.0)
        waiting.close()
        await asyncio.sleep(1.0)
        running.close()
        await asyncio.sleep(0.01)
        page = await scrape(service)
        assert page.outcomes == {"cancelled": 2}
        assert page.times("queue_time") == (1, 0.0), "a request that never started has no queue time"
        assert page.times("time_to_first_token") == (1, 0.1)
        assert page.times("request_duration") == (2, 1.0 + 2.0)
        assert (page["prompt_tokens_total"], page["generated_tokens_total"]) == (1, 1), "unfinished requests count too"


@in_virtual_time
async def test_failed_before_and_after_the_first_token() -> None:
    async with open_service(n=1) as service:
        for message in ("fail-at-once", "fail"):
            await ask(service.browser(), message)
        page = await scrape(service)
        assert page.outcomes == {"failed": 2}
        assert page.times("time_to_first_token") == (1, 0.1)
        assert page.times("request_duration") == (2, 0.1 + 0.2)
        assert page["generated_tokens_total"] == 1


@in_virtual_time
async def test_a_request_that_expires_in_the_queue_is_counted() -> None:
    async with open_service(n=1, max_wait_s=5.0) as service:
        running, waiting = await service.occupy(2)
        await asyncio.sleep(6.0)
        page = await scrape(service)
        assert page.outcomes == {"expired": 1}
        assert page.rejections == {}, "the request was admitted"
        assert page.times("request_duration") == (1, 5.0)
        assert page.times("queue_time") == (1, 0.0)
        running.close()
        waiting.close()


@in_virtual_time
async def test_rejections_are_counted_by_code() -> None:
    async with open_service(n=1, q=1, scheduler=SchedulerSettings(max_waiting_per_client=1)) as service:
        browser = service.browser()

        async def refusal() -> str:
            code = (await browser.post("/chat_stream", json=HELLO, headers=SSE)).json()["code"]
            assert isinstance(code, str)
            return code

        streams = await service.occupy(2)
        assert [await refusal(), await refusal()] == ["queue_full", "queue_full"]
        await browser.patch("/queue", json={"paused": True})
        assert await refusal() == "paused"
        assert (await scrape(service))["paused"] == 1
        await browser.patch("/queue", json={"paused": False, "max_queue_size": 5})
        with pytest.raises(Overloaded, match="this client"):
            await service.occupy()
        service.chat_stream.start_drain()
        assert await refusal() == "shutting_down"
        page = await scrape(service)
        assert page.rejections == {"queue_full": 2, "paused": 1, "client_limit": 1, "shutting_down": 1}
        assert page.outcomes == {"rejected": 5, "cancelled": 1}, "a drain ends waiting requests"
        assert (page["paused"], page["draining"]) == (0, 1)
        assert page['limit_changes_total{source="operator"}'] == 1
        for stream in streams:
            stream.close()


@in_virtual_time
async def test_a_prompt_that_is_too_long_counts_as_cancelled() -> None:
    class Strict(FakeEngine):
        async def prepare(self, *args: Any, **named: Any) -> Any:
            raise PromptTooLong("too long")

    async with open_service(Strict()) as service:
        assert (await service.browser().post("/chat_stream", json=HELLO, headers=SSE)).status_code == 400
        await asyncio.sleep(0.01)  # the engine stops the generation
        assert (await scrape(service)).outcomes == {"cancelled": 1}


@in_virtual_time
async def test_a_requeued_request_counts_its_queue_time_once() -> None:
    def script(request: GenerationRequest) -> Sequence[Step]:
        attempts.append(request.request_id)
        return [EngineUnavailable("lost")] if len(attempts) == 1 else ["again"]

    attempts: list[str] = []
    async with open_service(FakeEngine(script, step_s=STEP_S)) as service:
        await ask(service.browser(), "hello")
        page = await scrape(service)
        assert (page.outcomes, page["requeues_total"]) == ({"finished": 1}, 1)
        assert page.times("queue_time") == (1, 0.0)
        assert page.times("time_to_first_token") == (1, 0.2), "the failed attempt is included"
        assert page.times("request_duration") == (1, 0.2)


@in_virtual_time
async def test_inter_token_latency_excludes_preempted_time() -> None:
    slices = SchedulerSettings(slice_tokens=4)
    async with open_service(FakeEngine(script, step_s=0.3), n=1, scheduler=slices) as service:
        async with (
            Raw(service.app, "/chat_stream", {"user_input": "long"}, headers=SSE) as long,
            Raw(service.app, "/chat_stream", HELLO, headers=SSE) as short,
        ):
            await asyncio.sleep(1.65)
            [new_client] = await service.occupy()
            page = await scrape(service)
            assert (page["requests_running"], page["requests_waiting"], page["requests_preempted"]) == (1, 2, 1)
            new_client.close()
            await long.until(lambda: long.is_complete and short.is_complete)
        page = await scrape(service)
        assert (page["preemptions_total"], page["requests_preempted"]) == (1, 0)
        assert page.times("preempted_time") == (1, 0.9)
        assert page.times("queue_time") == (2, 1.2)
        assert page["generated_tokens_total"] == 13
        assert page.times("inter_token_latency") == (9 + 2, 3.3)
        assert page.up_to("inter_token_latency", "0.4") == 11
        assert page.times("request_duration") == (3, 3.9 + 2.1 + 0.0)


@in_virtual_time
async def test_a_reclaimed_slot_is_counted() -> None:
    settings = SchedulerSettings(stall_timeout_s=5.0, abort_timeout_s=1.0)
    async with open_service(FakeEngine([Fault.DEAF]), scheduler=settings) as service:
        await service.browser().post("/chat_stream", json=HELLO, headers=SSE)
        page = await scrape(service)
        assert (page["slots_reclaimed_total"], page.outcomes) == (1, {"failed": 1})
        service.engine.heal()


@in_virtual_time
async def test_the_eta_error_covers_every_request_with_an_announced_eta() -> None:
    async with open_service(n=1, q=50) as service:
        errors: list[float] = []
        service.chat_stream.observe(
            lambda e: errors.append(e.eta_error_s) if isinstance(e, ev.Started) and e.eta_error_s is not None else None
        )

        async def visit(message: str) -> None:
            await ask(service.browser(), message)

        for message in ("hello", "long"):
            await asyncio.gather(*(visit(message) for _ in range(20)))
        page = await scrape(service)
        assert len(errors) > 10
        for bound in definitions.ETA_ERROR.buckets_s:
            assert page.up_to("eta_error", str(bound)) == sum(error <= bound for error in errors)
        assert page.up_to("eta_error", "+Inf") == len(errors)
        assert "chatstream_eta_error_seconds_sum" not in page.samples, "a sum that can fall is no counter"


@in_virtual_time
async def test_nothing_is_kept_of_a_request_after_its_end() -> None:
    """A thousand requests with every outcome; during the run only live requests have records."""
    chance = random.Random(7)

    def script(request: GenerationRequest) -> Sequence[Step]:
        match chance.randrange(5):
            case 0:
                return ["half ", RuntimeError("boom")]
            case 1:
                return [EngineUnavailable("lost")]
            case 2:
                return ["on ", Fault.HANG]
        return ["on "] * chance.randrange(1, 12)

    recorder = Recorder()
    settings = SchedulerSettings(slice_tokens=3, stall_timeout_s=3.0, max_wait_s=2.0)
    async with open_service(FakeEngine(script, step_s=STEP_S), n=3, q=10, scheduler=settings) as service:
        service.chat_stream.observe(recorder.observe)
        surplus: set[int] = set()

        async def visit() -> None:
            await asyncio.sleep(chance.uniform(0, 100))
            try:
                stream = await service.chat_stream.submit(ChatRequest(messages=(Message("user", "hello"),)))
            except Overloaded:
                return
            patience_s = chance.choice([0.05, 1.0, 60.0, 60.0])
            try:
                async with asyncio.timeout(patience_s):
                    async for _ in stream:
                        surplus.add(recorder.num_live - service.num_requests - service.chat_stream.stats().leaving)
            except TimeoutError:
                pass
            stream.close()

        await asyncio.gather(*(visit() for _ in range(1000)))
        await asyncio.sleep(10.0)
        stats, page = service.chat_stream.stats(), await scrape(service)
    assert stats.received == 1000
    assert set(page.outcomes) == {"finished", "cancelled", "failed", "expired", "rejected"}, page.outcomes
    assert sum(page.outcomes.values()) == 1000
    assert min(stats.requeued, int(page["preemptions_total"]), sum(page.rejections.values())) > 10
    assert surplus == {0}, "the recorder keeps a record of each live request, and no other"
    assert recorder.num_live == 0
    assert page.times("request_duration")[0] == 1000 - page.outcomes["rejected"]


# --- the recorder, event by event ------------------------------------------------------------------------------------


def recorded(*events: ev.Event) -> Recorder:
    recorder = Recorder()
    for event in (ev.Admitted(0, 10.0, "a", 0, 1), *events):
        recorder.observe(event)
    return recorder


GRANT = Grant(0, "a", 1, 1)


def test_tokens_delivered_together_count_as_equal_gaps_except_the_first() -> None:
    recorder = recorded(ev.Tokens(1, 11.0, "a", 3, 3), ev.Tokens(2, 12.0, "a", 4, 7))
    assert (sum(recorder.time_to_first_token.counts), recorder.time_to_first_token.sum) == (1, 1.0)
    assert (sum(recorder.inter_token_latency.counts), recorder.inter_token_latency.sum) == (4, 1.0)
    quarter = definitions.INTER_TOKEN_LATENCY.buckets_s.index(0.3)
    assert recorder.inter_token_latency.counts[quarter] == 4


@pytest.mark.parametrize(
    ("token_s", "resumed", "gap_s"),
    [
        pytest.param(11.0, ev.Resumed(2, 16.0, "a", GRANT, 4.0), 2.0, id="token before the preemption"),
        pytest.param(13.0, ev.Resumed(2, 16.0, "a", GRANT, 4.0), 1.0, id="token in transit at the preemption"),
    ],
)
def test_a_gap_does_not_grow_while_the_request_is_preempted(token_s: float, resumed: ev.Resumed, gap_s: float) -> None:
    recorder = recorded(ev.Tokens(1, token_s, "a", 1, 1), resumed, ev.Tokens(3, 17.0, "a", 1, 2))
    assert recorder.inter_token_latency.sum == pytest.approx(gap_s)
    assert recorder.preempted_time.sum == 4.0


def test_time_to_first_token_includes_preempted_time() -> None:
    recorder = recorded(ev.Resumed(1, 16.0, "a", GRANT, 4.0), ev.Tokens(2, 17.0, "a", 1, 1))
    assert recorder.time_to_first_token.sum == 7.0
    assert sum(recorder.inter_token_latency.counts) == 0


def test_without_an_announced_eta_no_error_is_recorded() -> None:
    recorder = recorded(ev.Started(1, 12.0, "a", GRANT, 2.0, None))
    assert (recorder.queue_time.sum, sum(recorder.eta_error.counts)) == (2.0, 0)
    recorder = recorded(ev.Started(1, 12.0, "a", GRANT, 2.0, -3.0))
    bounds = definitions.ETA_ERROR.buckets_s
    assert recorder.eta_error.counts[bounds.index(-2.0)] == 1


def test_changes_of_a_limit_are_counted_by_source() -> None:
    changes = [ev.LimitsChanged(n, 1.0, 2, 5, by, "") for n, by in enumerate(["adaptive", "auto", "admin", "", "me"])]
    assert recorded(*changes).limit_changes == {"adaptive": 1, "auto": 1, "operator": 3}


@given(st.lists(st.floats(-1, 11) | st.sampled_from([0.5, 1.0, 10.0])))
def test_a_distribution_equals_the_librarys_histogram(values: list[float]) -> None:
    bounds = (0.5, 1.0, 10.0)
    ours, theirs = Distribution(bounds), LibraryHistogram("h", "", buckets=bounds, registry=None)
    for value in values:
        ours.add(value)
        theirs.observe(value)
    [family] = theirs.collect()
    buckets = [int(s.value) for s in family.samples if s.name == "h_bucket"]
    assert ours.counts == [high - low for low, high in pairwise([0, *buckets])]
    assert [ours.sum] == [s.value for s in family.samples if s.name == "h_sum"]


@pytest.mark.parametrize("definition", [d for d in all_definitions() if isinstance(d, Histogram)], ids=lambda d: d.name)
def test_buckets_ascend_and_stay_few(definition: Histogram) -> None:
    assert list(definition.buckets_s) == sorted(set(definition.buckets_s))
    assert len(definition.buckets_s) <= 20


# --- the documentation -----------------------------------------------------------------------------------------------


def test_every_metric_is_a_row_of_the_table_with_its_kind() -> None:
    rows = dict(re.findall(r"^\| `(chatstream_[\w{}]+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE))
    assert rows == PROMISED | OTHERS


def test_every_name_label_and_bucket_in_a_query_exists() -> None:
    page = ChatStream(engine=FakeEngine()).metrics.page()[0].decode()
    samples = Scrape(page).samples
    text = PAGE.read_text("utf-8")
    queries = re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(queries) >= 3
    used = [one for query in queries for one in re.findall(r"(chatstream_\w+)(?:{([^}]*)})?", query)]
    for name, selector in used:
        series = [sample for sample in samples if sample == name or sample.startswith(f"{name}{{")]
        assert series, name
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            values = {found[1] for sample in series if (found := re.search(rf'{label}="([^"]*)"', sample))}
            assert values, f"{name} has no {label}"
            wanted = value.split("|") if "~" in operator else [value]
            assert set(wanted) <= values, f"{name}{{{selector}}}"
