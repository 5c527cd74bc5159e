"""An engine in virtual time: durations of prompts and tokens, and the slowdown of concurrent generations.

All running generations advance at the same pace, so one work clock serves all of them. It counts seconds of a
generation that runs alone, and runs slower when more generations run. A generation that starts at clock time w with
v seconds of work ends at w + v; a start or an end of another one changes the clock, not this sum.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from chatstream.checks import check_int, check_number, check_seconds
from chatstream.scheduler import Grant

MIN_VALUE, MAX_VALUE = 1e-9, 1e9
"""Bounds of all durations and speeds: wider than any real engine, and safe in float arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The speed of an engine. An invalid value raises `ConfigError` with the name of the setting.

    A batched engine whose step takes 20 + 5 b milliseconds for b generations: `time_per_token_s=0.025,
    slowdown_per_slot=0.2`. One processor that generates for all requests in rotation: `slowdown_per_slot=1`.
    """

    prefill_tokens_per_s: float = 1000.0
    """Prompt tokens per second of a generation that runs alone."""
    time_per_token_s: float = 0.02
    """Seconds per answer token of a generation that runs alone."""
    slowdown_per_slot: float = 0.0
    """Each further running generation adds this share of `time_per_token_s` to a token of every generation."""
    prefill_chunk_tokens: int | None = None
    """None: each slot computes its own prompt. A number: prompts are computed one after the other in chunks of this
    size; one chunk delays each step of the generating sequences, as in the step loop of ChatStream."""

    def __post_init__(self) -> None:
        check_number("prefill_tokens_per_s", self.prefill_tokens_per_s, at_least=MIN_VALUE, at_most=MAX_VALUE)
        check_seconds("time_per_token_s", self.time_per_token_s, at_least=MIN_VALUE, at_most=MAX_VALUE)
        check_number("slowdown_per_slot", self.slowdown_per_slot, at_least=0, at_most=MAX_VALUE)
        check_int("prefill_chunk_tokens", self.prefill_chunk_tokens, at_least=1, or_none=True)

    def work_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds from start to end of a generation that runs alone."""
        return prompt_tokens / self.prefill_tokens_per_s + output_tokens * self.time_per_token_s

    def slowdown(self, num_running: int) -> float:
        """Duration of a token with `num_running` generations, relative to one that runs alone."""
        return 1.0 + self.slowdown_per_slot * (num_running - 1) if num_running else 0.0

    def seconds_per_request(self, num_slots: int, prompt_tokens: float, output_tokens: float) -> float:
        """Mean seconds between two ends when all slots are always in use, for these mean lengths."""
        prompt_s = prompt_tokens / self.prefill_tokens_per_s
        share = self.slowdown(num_slots) / num_slots
        answer_s = output_tokens * self.time_per_token_s * share
        return answer_s + prompt_s * (share if self.prefill_chunk_tokens is None else 1.0)


class Generation:
    """One request inside the engine. Its progress is measured in seconds of the work clock."""

    __slots__ = (
        "_due",
        "_origin_s",
        "_progress_s",
        "_version",
        "grant",
        "output_tokens",
        "prompt_s",
        "prompt_tokens",
        "reported",
        "reported_prompt",
    )

    def __init__(self, grant: Grant, prompt_tokens: int, output_tokens: int, prompt_s: float) -> None:
        self.grant = grant
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.prompt_s = prompt_s
        self.reported = 0
        self.reported_prompt = 0
        self._origin_s: float | None = None  # work-clock time of progress 0; None: no progress now
        self._progress_s = 0.0  # progress when it last stopped
        self._due = 0, 0  # answer and prompt tokens at the time of its heap entry
        self._version = 0  # heap entries with an older version are stale

    @property
    def is_complete(self) -> bool:
        return self.reported >= self.output_tokens


class Report(NamedTuple):
    """Progress of a generation since its previous report."""

    generation: Generation
    num_tokens: int
    num_prompt_tokens: int


class SimulatedEngine:
    """The generations of a simulated engine, and the reports that become due.

    A generation reports its first token, then every `grain_tokens`, then its last token. With `grain_prompt_tokens` it
    also reports the progress of its prompt. A coarse grain makes a run fast. Decisions taken at arrivals, starts and
    ends do not depend on it; decisions taken at tokens (time slices, adaptive concurrency) need a grain as fine as
    their own. `unreported` gives the exact progress at any time.
    """

    def __init__(self, model: EngineModel, *, grain_tokens: int, grain_prompt_tokens: int | None = None) -> None:
        self._model = model
        self._grain_tokens = grain_tokens
        self._grain_prompt_tokens = grain_prompt_tokens
        self._token_s = model.time_per_token_s
        self._tolerance_s = 1e-3 * self._token_s  # far above the float error of weeks of virtual time
        chunk_tokens = model.prefill_chunk_tokens
        # With chunks the work clock counts steps: one token per generating sequence and one chunk of one prompt.
        self._prompt_token_s = self._token_s / chunk_tokens if chunk_tokens else 1 / model.prefill_tokens_per_s
        self._chunk_slowdown = (chunk_tokens or 0) / model.prefill_tokens_per_s / self._token_s
        self._running: dict[str, Generation] = {}
        self._preempted: dict[str, Generation] = {}
        self._prompts: list[Generation] = []  # with chunks: generations with an unfinished prompt, in order
        self._heap: list[tuple[float, int, Generation, int]] = []
        self._count = 0
        self._speed = 1.0
        self._slowdown = 1.0
        self._work_s = 0.0  # the work clock at `_at_s`
        self._at_s = 0.0

    def __len__(self) -> int:
        """Number of running generations; preempted ones are not counted."""
        return len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running or request_id in self._preempted

    def start(self, grant: Grant, prompt_tokens: int, output_tokens: int, now_s: float) -> None:
        self._run(Generation(grant, prompt_tokens, output_tokens, prompt_tokens * self._prompt_token_s), now_s)

    def resume(self, grant: Grant, now_s: float) -> None:
        """Continue a preempted generation from its last progress."""
        generation = self._preempted.pop(grant.request_id)
        generation.grant = grant
        self._run(generation, now_s)

    def preempt(self, request_id: str, now_s: float) -> None:
        self._preempted[request_id] = self._stop(request_id, now_s)

    def drop(self, request_id: str, now_s: float) -> None:
        """End a running or preempted generation before its last token."""
        if self._preempted.pop(request_id, None) is None:
            self._stop(request_id, now_s)

    def next_s(self) -> float:
        """Time of the next report; infinity when nothing runs."""
        heap = self._heap
        while heap and heap[0][3] != heap[0][2]._version:
            heapq.heappop(heap)
        return self._at_s + (heap[0][0] - self._work_s) * self._slowdown if heap else inf

    def take_next(self) -> Report:
        """Return the report that is due at `next_s`. The last report removes its generation."""
        self._at_s, self._work_s = self.next_s(), self._heap[0][0]
        generation = self._heap[0][2]
        # Report the scheduled amount, not the clock: there is progress even where two tokens have the same float time.
        report = self._report(generation, *generation._due)
        if generation.is_complete:
            heapq.heappop(self._heap)
            del self._running[generation.grant.request_id]
            self._remove_prompt(generation)
            self._update_slowdown()
        else:
            heapq.heapreplace(self._heap, self._entry(generation))
            if report.num_tokens and report.num_tokens == generation.reported:
                self._remove_prompt(generation)
                self._update_slowdown()
        return report

    def unreported(self, now_s: float) -> list[Report]:
        """Return the progress of all running generations since their last reports, and mark it as reported."""
        self._advance(now_s)
        reports = [self._report(generation, *self._progress(generation)) for generation in self._running.values()]
        return [report for report in reports if report.num_tokens or report.num_prompt_tokens]

    def set_speed(self, speed: float, now_s: float) -> None:
        """Run the whole engine at `speed` times the speed of its model from now on."""
        self._advance(now_s)
        self._speed = speed
        self._update_slowdown()

    def _run(self, generation: Generation, now_s: float) -> None:
        self._advance(now_s)
        self._running[generation.grant.request_id] = generation
        if self._chunk_slowdown and not generation.reported:
            self._prompts.append(generation)
        if not self._prompts or generation is self._prompts[0] or generation.reported:
            self._begin_progress(generation)
        self._update_slowdown()

    def _begin_progress(self, generation: Generation) -> None:
        generation._origin_s = self._work_s - generation._progress_s
        heapq.heappush(self._heap, self._entry(generation))

    def _stop(self, request_id: str, now_s: float) -> Generation:
        self._advance(now_s)
        generation = self._running.pop(request_id)
        generation._version += 1
        if generation._origin_s is not None:
            generation._progress_s = self._work_s - generation._origin_s
            generation._origin_s = None
        self._remove_prompt(generation)
        self._update_slowdown()
        return generation

    def _remove_prompt(self, generation: Generation) -> None:
        """Remove a generation with a complete prompt, or one that stopped, and begin the next prompt."""
        if generation in self._prompts:
            was_first = self._prompts[0] is generation
            self._prompts.remove(generation)
            if was_first and self._prompts:
                self._begin_progress(self._prompts[0])

    def _advance(self, now_s: float) -> None:
        self._work_s += (now_s - self._at_s) / self._slowdown
        self._at_s = now_s

    def _update_slowdown(self) -> None:
        """Adapt the pace of the clock to the running generations. Call `_advance` first."""
        slowdown = self._model.slowdown(len(self._running) - len(self._prompts))
        if self._prompts:
            slowdown += self._chunk_slowdown
        self._slowdown = (slowdown or 1.0) / self._speed

    def _entry(self, generation: Generation) -> tuple[float, int, Generation, int]:
        assert generation._origin_s is not None
        self._count += 1
        grain = self._grain_prompt_tokens
        if grain and generation.reported_prompt + grain < generation.prompt_tokens:
            generation._due = 0, generation.reported_prompt + grain
            due_s = generation._due[1] * self._prompt_token_s
        else:
            generation._due = self._next_token(generation), generation.prompt_tokens
            due_s = self._token_done_s(generation, generation._due[0])
        return generation._origin_s + due_s, self._count, generation, generation._version

    def _next_token(self, generation: Generation) -> int:
        """Number of the next token with a report: the first, every `grain_tokens`, the last."""
        reported, grain = generation.reported, self._grain_tokens
        return min(reported - reported % grain + grain, generation.output_tokens) if reported else 1

    def _token_done_s(self, generation: Generation, number: int) -> float:
        """Progress at which a token is complete. With chunks the last prompt step also generates the first token."""
        return generation.prompt_s + (number - 1 if self._chunk_slowdown else number) * self._token_s

    def _progress(self, generation: Generation) -> tuple[int, int]:
        """Answer tokens and prompt tokens by the clock, without the next token with a report, which may be due now."""
        if generation._origin_s is None:
            return 0, 0
        progress_s = self._work_s - generation._origin_s + self._tolerance_s
        if not generation.reported:
            return 0, self._prompt_tokens_read(generation, progress_s)
        done = 1 + int((progress_s - self._token_done_s(generation, 1)) / self._token_s)
        return min(done, self._next_token(generation) - 1), generation.prompt_tokens

    def _report(self, generation: Generation, tokens: int, prompt_tokens: int) -> Report:
        """Build the report of a generation with these totals since its start."""
        report = Report(
            generation, max(0, tokens - generation.reported), max(0, prompt_tokens - generation.reported_prompt)
        )
        generation.reported += report.num_tokens
        generation.reported_prompt += report.num_prompt_tokens
        return report

    def _prompt_tokens_read(self, generation: Generation, progress_s: float) -> int:
        """Prompt tokens read, rounded down to whole grains; 0 without `grain_prompt_tokens`."""
        grain = self._grain_prompt_tokens
        if not grain:
            return 0
        read = min(int(progress_s / self._prompt_token_s), generation.prompt_tokens)
        return max(generation.reported_prompt, read - read % grain)
