"""A controller of the prefill part: it measures step times and sets the prompt tokens of the next step. Pure.

Prompt tokens make a step longer, and all generating sequences wait for it. A prompt is therefore split into chunks that
keep the step time within a bound (chunked prefill: Sarathi-Serve, Agrawal et al., OSDI'24, where profiling fixes the
size of a chunk; here it follows from the measured times). The model of a step's time is linear: the time of a plain
step (one without prompt tokens) plus a constant per prompt token.
"""

from __future__ import annotations

from math import inf

GAP_FACTOR = 1.9
"""Default bound of a step, in plain steps. The gap between two tokens of a stream should stay below two plain steps;
the rest is margin for variation."""
CROWD_GAP_FACTOR = 4.0
"""Bound of a step, in plain steps, while more requests wait for their first token than generate. The bound grows with
the ratio of the two up to this value, because longer steps compute more tokens per second."""
TILE = 4
"""Prompt and decode tokens of a step together are a multiple of this where possible, because the math library prepares
a kernel for each new number of tokens. Smaller than the 16 rows of matrix units: on machines without such units, 16
would leave up to two thirds of a small budget unused."""
MIN_TOKENS = 8
"""Lower bound of the prompt tokens, before rounding to tiles, regardless of their time. At one token per step, a long
prefill would hardly end."""
FIRST_BUDGET = 64
"""Prompt tokens of the first step with any, before one was measured."""
SMOOTHING = 0.2
"""Weight of the newest measurement in the running means."""
MAX_JUMP = 2.0
"""A measurement above this multiple of the expected time is clipped to it: a stall of the machine does not predict the
next step. A measurement below the inverse shows that the estimate itself came from a stall; the estimate is reset."""
STALE_STEPS = 64
"""After this many steps with prompt tokens, one step runs without any, to measure its time again."""


class PromptBudget:
    """Input: the time of each step (`record_step`). Output: the prompt tokens of the next step (`next_step_tokens`)."""

    def __init__(self, max_tokens: int, itl_target_s: float | None = None) -> None:
        """`max_tokens` bounds every step, even if no sequence generates: a cancellation takes effect after the step.

        `itl_target_s`: bound of a step's time. None: relative to a plain step (`GAP_FACTOR`). inf: no bound.
        """
        self._max_tokens = max_tokens
        self._itl_target_s = itl_target_s
        self._plain_step_s = 0.0
        """Estimated time of a plain step."""
        self._plain_num_generating = 0
        """Generating sequences in the last plain step. 0: no measurement."""
        self._steps_since_plain = 0
        self._time_by_tokens = self._tokens_squared = 0.0
        """Running means over steps with prompt tokens: added time multiplied by number of tokens; number squared."""
        self._max_measured = 0
        """The largest number of prompt tokens in a measured step. 0: no measurement."""

    def next_step_tokens(self, num_generating: int, num_waiting: int = 1) -> int:
        """The prompt tokens that the next step may compute for all waiting sequences together, at most `max_tokens`.

        `num_waiting`: sequences that wait for their first token. 0 is returned when the next step must be a plain one,
        for a measurement.
        """
        if num_generating == 0 or self._itl_target_s == inf:
            return self._max_tokens
        # Never two plain steps in a row while a prompt waits, even if `num_generating` changes with every step.
        was_last_step_plain = self._plain_num_generating and not self._steps_since_plain
        if not (was_last_step_plain or self._has_plain_measurement(num_generating)):
            return 0
        if self._itl_target_s is None:
            crowd = max(1.0, num_waiting / num_generating)
            prefill_s = min((GAP_FACTOR - 1) * crowd, CROWD_GAP_FACTOR - 1) * self._plain_step_s
        else:
            prefill_s = self._itl_target_s - self._plain_step_s
        # At most twice the largest measured number: the line must not be extrapolated further.
        affordable: float = min(max(FIRST_BUDGET, 2 * self._max_measured), self._max_tokens)
        if self._token_s:
            affordable = min(affordable, max(MIN_TOKENS, prefill_s / self._token_s))
        num_tokens = int(num_generating + affordable) // TILE * TILE - num_generating
        if num_tokens < TILE // 2:  # `max_tokens` is less than a tile
            num_tokens += TILE
        return min(num_tokens, self._max_tokens)

    def record_step(self, num_generating: int, num_prompt_tokens: int, step_s: float) -> None:
        """Record the time of a step that has ended."""
        if not num_generating:
            return
        if num_prompt_tokens:
            self._record_mixed_step(num_prompt_tokens, step_s)
            return
        if self._has_plain_measurement(num_generating) and MAX_JUMP * step_s > self._plain_step_s:
            self._plain_step_s += SMOOTHING * (min(step_s, MAX_JUMP * self._plain_step_s) - self._plain_step_s)
        else:
            self._plain_step_s = step_s
        self._plain_num_generating = num_generating
        self._steps_since_plain = 0

    def _record_mixed_step(self, num_tokens: int, step_s: float) -> None:
        self._steps_since_plain += 1
        if not self._plain_num_generating:
            return
        expected_s = self._plain_step_s + self._token_s * num_tokens
        if MAX_JUMP * step_s < expected_s:
            self._plain_num_generating = self._max_measured = 0
            self._time_by_tokens = self._tokens_squared = 0.0
            return
        weight = SMOOTHING if self._max_measured else 1.0
        clipped_s = min(step_s, MAX_JUMP * expected_s) if self._max_measured else step_s
        added_s = max(0.0, clipped_s - self._plain_step_s)
        self._time_by_tokens += weight * (added_s * num_tokens - self._time_by_tokens)
        self._tokens_squared += weight * (num_tokens**2 - self._tokens_squared)
        self._max_measured = max(self._max_measured, num_tokens)

    @property
    def _token_s(self) -> float:
        """Estimated time that a prompt token adds to a step; 0: unknown or not measurable.

        Least squares through the origin, so that steps with few tokens, as at the end of a prompt, count little: the
        fixed cost of a prefill makes their tokens seem expensive.
        """
        return self._time_by_tokens / self._tokens_squared if self._tokens_squared else 0.0

    def _has_plain_measurement(self, num_generating: int) -> bool:
        """Whether the estimate of a plain step is recent, and from between half and twice as many sequences."""
        measured = self._plain_num_generating
        return self._steps_since_plain < STALE_STEPS and measured <= 2 * num_generating <= 4 * measured
