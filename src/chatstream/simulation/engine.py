"""An engine in virtual time: how long prompts and tokens take, and how those who run hold each other up.

What runs together advances at one common pace, so one clock is enough for all: it is counted in seconds that pass for
a generation that runs alone, and slows down when more run. Whoever starts when it shows w and has v seconds to go is
done when it shows w + v; nothing is computed anew when others come and go.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from chatstream.checks import check_int, check_number, check_seconds
from chatstream.scheduler import Grant

LEAST, MOST = 1e-9, 1e9
"""Of seconds and speeds of an engine: far beyond all that there are, and far within what floats can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """Checked when built; a wrong value raises `ConfigError` that names it.

    A batched engine whose step takes 20 + 5 b milliseconds for b generations: `time_per_token_s=0.025,
    slowdown_per_slot=0.2`. One processor that gives everybody a token in turn: `slowdown_per_slot=1`.
    """

    prefill_tokens_per_s: float = 1000.0
    """Tokens of a prompt that are read in a second by a generation that runs alone."""
    time_per_token_s: float = 0.02
    """Seconds for each token of an answer to a generation that runs alone."""
    slowdown_per_slot: float = 0.0
    """Each further one that runs makes all of them slower by so much of the speed of one alone; 0: not at all."""
    prefill_chunk_tokens: int | None = None
    """None: each slot reads its own prompt. A number: prompts are read one after the other, so many tokens between
    two tokens of those who generate, whom it holds up for so long; that is what the step loop of ChatStream does."""

    def __post_init__(self) -> None:
        check_number("prefill_tokens_per_s", self.prefill_tokens_per_s, at_least=LEAST, at_most=MOST)
        check_seconds("time_per_token_s", self.time_per_token_s, at_least=LEAST, at_most=MOST)
        check_number("slowdown_per_slot", self.slowdown_per_slot, at_least=0, at_most=MOST)
        check_int("prefill_chunk_tokens", self.prefill_chunk_tokens, at_least=1, or_none=True)

    def work_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds from start to end when it runs alone."""
        return prompt_tokens / self.prefill_tokens_per_s + output_tokens * self.time_per_token_s

    def slowdown(self, num_running: int) -> float:
        """How much longer a token takes when so many run."""
        return 1.0 + self.slowdown_per_slot * (num_running - 1) if num_running else 0.0

    def seconds_per_request(self, num_slots: int, prompt_tokens: float, output_tokens: float) -> float:
        """The mean time between two ends when all slots are always taken, for these mean lengths."""
        prompt_s = prompt_tokens / self.prefill_tokens_per_s
        share = self.slowdown(num_slots) / num_slots
        answer_s = output_tokens * self.time_per_token_s * share
        return answer_s + prompt_s * (share if self.prefill_chunk_tokens is None else 1.0)


class Generation:
    """One request inside the engine. Its progress is in seconds of the common clock since its start."""

    __slots__ = (
        "_begin_s",
        "_done_s",
        "_due",
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
        self._begin_s: float | None = None  # on the clock, moved when it is resumed; None: it makes no progress now
        self._done_s = 0.0  # what it had done when it last stopped
        self._due = 0, 0  # what it will have done at its entry of the heap: tokens of the answer, of the prompt
        self._version = 0  # entries of the heap with an older one are dead

    @property
    def is_complete(self) -> bool:
        return self.reported >= self.output_tokens


class Report(NamedTuple):
    """What a generation has done since the report before."""

    generation: Generation
    num_tokens: int
    num_prompt_tokens: int


class SimulatedEngine:
    """Generations under way. Reports come at the first token, then every `grain_tokens`, then at the last one; with
    `grain_prompt_tokens` also while a prompt is read.

    A coarse grain makes a run quick, and no decision that is taken at arrivals, starts and ends depends on it; one
    that is taken at tokens (time slices, adaptive concurrency) needs a grain as fine as itself. `unreported` tells
    the exact progress at any time.
    """

    def __init__(self, model: EngineModel, *, grain_tokens: int, grain_prompt_tokens: int | None = None) -> None:
        self._model = model
        self._grain_tokens = grain_tokens
        self._grain_prompt_tokens = grain_prompt_tokens
        self._token_s = model.time_per_token_s
        self._tolerance_s = 1e-3 * self._token_s  # far above what floats lose in weeks of virtual time
        chunk_tokens = model.prefill_chunk_tokens
        # With chunks the clock shows steps: a token each for those who generate, and a chunk of one prompt.
        self._prompt_token_s = self._token_s / chunk_tokens if chunk_tokens else 1 / model.prefill_tokens_per_s
        self._chunk_slowdown = (chunk_tokens or 0) / model.prefill_tokens_per_s / self._token_s
        self._running: dict[str, Generation] = {}
        self._preempted: dict[str, Generation] = {}
        self._prompts: list[Generation] = []  # with chunks: those whose prompt is not read, in the order of reading
        self._heap: list[tuple[float, int, Generation, int]] = []
        self._count = 0
        self._speed = 1.0
        self._slowdown = 1.0
        self._work_s = 0.0  # the common clock, as it was at `_at_s`
        self._at_s = 0.0

    def __len__(self) -> int:
        """How many run; the preempted ones do not."""
        return len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running or request_id in self._preempted

    def start(self, grant: Grant, prompt_tokens: int, output_tokens: int, now_s: float) -> None:
        self._run(Generation(grant, prompt_tokens, output_tokens, prompt_tokens * self._prompt_token_s), now_s)

    def resume(self, grant: Grant, now_s: float) -> None:
        """A preempted one goes on where it was."""
        generation = self._preempted.pop(grant.request_id)
        generation.grant = grant
        self._run(generation, now_s)

    def preempt(self, request_id: str, now_s: float) -> None:
        self._preempted[request_id] = self._stop(request_id, now_s)

    def drop(self, request_id: str, now_s: float) -> None:
        """It ends before its last token, running or preempted."""
        if self._preempted.pop(request_id, None) is None:
            self._stop(request_id, now_s)

    def next_s(self) -> float:
        """When the next report is due; infinity when nothing runs."""
        heap = self._heap
        while heap and heap[0][3] != heap[0][2]._version:
            heapq.heappop(heap)
        return self._at_s + (heap[0][0] - self._work_s) * self._slowdown if heap else inf

    def take_next(self) -> Report:
        """The report that is due at `next_s`. After the last one the generation is gone."""
        self._at_s, self._work_s = self.next_s(), self._heap[0][0]
        generation = self._heap[0][2]
        # What was due, not what the clock says: there is progress also where floats cannot tell two tokens apart.
        report = self._report(generation, *generation._due)
        if generation.is_complete:
            heapq.heappop(self._heap)
            del self._running[generation.grant.request_id]
            self._leave_prompts(generation)
            self._adjust()
        else:
            heapq.heapreplace(self._heap, self._entry(generation))
            if report.num_tokens and report.num_tokens == generation.reported:
                self._leave_prompts(generation)
                self._adjust()
        return report

    def unreported(self, now_s: float) -> list[Report]:
        """What those who run have done since their last report; it counts as reported from now on."""
        self._advance(now_s)
        reports = [self._report(some, *self._done(some)) for some in self._running.values()]
        return [report for report in reports if report.num_tokens or report.num_prompt_tokens]

    def set_speed(self, speed: float, now_s: float) -> None:
        """From now on the whole engine is so many times as fast as its model says."""
        self._advance(now_s)
        self._speed = speed
        self._adjust()

    def _run(self, generation: Generation, now_s: float) -> None:
        self._advance(now_s)
        self._running[generation.grant.request_id] = generation
        if self._chunk_slowdown and not generation.reported:
            self._prompts.append(generation)
        if not self._prompts or generation is self._prompts[0] or generation.reported:
            self._proceed(generation)
        self._adjust()

    def _proceed(self, generation: Generation) -> None:
        generation._begin_s = self._work_s - generation._done_s
        heapq.heappush(self._heap, self._entry(generation))

    def _stop(self, request_id: str, now_s: float) -> Generation:
        self._advance(now_s)
        generation = self._running.pop(request_id)
        generation._version += 1
        if generation._begin_s is not None:
            generation._done_s = self._work_s - generation._begin_s
            generation._begin_s = None
        self._leave_prompts(generation)
        self._adjust()
        return generation

    def _leave_prompts(self, generation: Generation) -> None:
        """Its prompt is read, or it does not run any more."""
        if generation in self._prompts:
            was_first = self._prompts[0] is generation
            self._prompts.remove(generation)
            if was_first and self._prompts:
                self._proceed(self._prompts[0])

    def _advance(self, now_s: float) -> None:
        self._work_s += (now_s - self._at_s) / self._slowdown
        self._at_s = now_s

    def _adjust(self) -> None:
        """Others run than before; the clock must have been advanced to this moment."""
        slowdown = self._model.slowdown(len(self._running) - len(self._prompts))
        if self._prompts:
            slowdown += self._chunk_slowdown
        self._slowdown = (slowdown or 1.0) / self._speed

    def _entry(self, generation: Generation) -> tuple[float, int, Generation, int]:
        assert generation._begin_s is not None
        self._count += 1
        grain = self._grain_prompt_tokens
        if grain and generation.reported_prompt + grain < generation.prompt_tokens:
            generation._due = 0, generation.reported_prompt + grain
            due_s = generation._due[1] * self._prompt_token_s
        else:
            generation._due = self._next_token(generation), generation.prompt_tokens
            due_s = self._token_done_s(generation, generation._due[0])
        return generation._begin_s + due_s, self._count, generation, generation._version

    def _next_token(self, generation: Generation) -> int:
        """The token that has the next report of its own: the first, every `grain_tokens`, the last."""
        reported, grain = generation.reported, self._grain_tokens
        return min(reported - reported % grain + grain, generation.output_tokens) if reported else 1

    def _token_done_s(self, generation: Generation, number: int) -> float:
        """In its progress. The step that reads the last of a prompt generates the first token."""
        return generation.prompt_s + (number - 1 if self._chunk_slowdown else number) * self._token_s

    def _done(self, generation: Generation) -> tuple[int, int]:
        """What the clock says it has done: tokens of the answer, of the prompt. Without the token that has a report of
        its own, which may be due at this very moment."""
        if generation._begin_s is None:
            return 0, 0
        progress_s = self._work_s - generation._begin_s + self._tolerance_s
        if not generation.reported:
            return 0, self._num_read(generation, progress_s)
        done = 1 + int((progress_s - self._token_done_s(generation, 1)) / self._token_s)
        return min(done, self._next_token(generation) - 1), generation.prompt_tokens

    def _report(self, generation: Generation, tokens: int, prompt_tokens: int) -> Report:
        """It has done so much since its start."""
        report = Report(
            generation, max(0, tokens - generation.reported), max(0, prompt_tokens - generation.reported_prompt)
        )
        generation.reported += report.num_tokens
        generation.reported_prompt += report.num_prompt_tokens
        return report

    def _num_read(self, generation: Generation, progress_s: float) -> int:
        """Of its prompt, in whole grains, as far as that is reported before the first token."""
        grain = self._grain_prompt_tokens
        if not grain:
            return 0
        read = min(int(progress_s / self._prompt_token_s), generation.prompt_tokens)
        return max(generation.reported_prompt, read - read % grain)
