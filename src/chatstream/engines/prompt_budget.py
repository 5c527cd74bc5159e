"""How many tokens of newcomers' prompts a step may carry beside the tokens of those who generate. Pure.

A step that reads prompt tokens takes longer, and everybody who generates waits for it. So the prompt is cut into parts
that keep a step within a bound (Sarathi-Serve, Agrawal et al., OSDI'24; there the part is fixed by profiling, here it
follows what steps really took). The model of a step's time is a line: what a step without prompts takes, and so much
for each prompt token.
"""

from __future__ import annotations

from math import inf

GAP_FACTOR = 1.8
"""Without a target of its own, a step may take so many times the usual one: the largest gap that others see is to stay
below twice the usual, and the time varies."""
TILE = 16
"""The tokens of a step are a multiple of it where possible: matrix units work in tiles, and every new number of tokens
costs the library a kernel made for it."""
FIRST_BUDGET = 64
"""Before a step with prompt tokens was measured."""
WEIGHT = 0.2
"""Of the newest measurement in the running means."""
MAX_JUMP = 3.0
"""One measurement counts as at most so many times the mean: a stall of the machine says nothing of the next step."""
STALE_STEPS = 256
"""After so many steps with prompt tokens, one goes without, to see what that takes now."""


class PromptBudget:
    """Facts in: how long steps took. Decision out: how many prompt tokens the next one may carry."""

    def __init__(self, max_tokens: int, itl_target_s: float | None = None) -> None:
        """`max_tokens` bounds a step's prompt tokens also when nobody generates: cancelling takes effect after it.

        `itl_target_s`: what a step may take; None: in proportion to one without prompts; inf: as long as it wants.
        """
        self._max_tokens = max_tokens
        self._itl_target_s = itl_target_s
        self._plain_step_s = 0.0
        """A step without prompt tokens; 0: never measured."""
        self._plain_num_generating = 0
        self._steps_since_plain = 0
        self._token_s = 0.0
        """What a prompt token adds; 0: never measured, or nothing."""

    def tokens(self, num_generating: int) -> int:
        """At most `max_tokens`. 0: not now, a step without prompts is to be measured first."""
        if num_generating == 0 or self._itl_target_s == inf:
            return self._max_tokens
        if not self._knows_plain_step(num_generating):
            return 0
        wanted = FIRST_BUDGET
        if self._token_s:
            limit_s = GAP_FACTOR * self._plain_step_s if self._itl_target_s is None else self._itl_target_s
            wanted = max(TILE, int((limit_s - self._plain_step_s) / self._token_s))
        in_whole_tiles = (num_generating + wanted) // TILE * TILE - num_generating
        return max(1, min(in_whole_tiles, self._max_tokens))

    def note(self, num_generating: int, num_prompt_tokens: int, step_s: float) -> None:
        """A step has ended."""
        if not num_generating:
            return
        if num_prompt_tokens:
            self._steps_since_plain += 1
            if self._plain_step_s:
                added_s = max(0.0, step_s - self._plain_step_s)
                self._token_s = _mean(self._token_s, added_s / num_prompt_tokens)
            return
        is_known = self._knows_plain_step(num_generating)
        self._plain_step_s = _mean(self._plain_step_s, step_s) if is_known else step_s
        self._plain_num_generating = num_generating
        self._steps_since_plain = 0

    def _knows_plain_step(self, num_generating: int) -> bool:
        measured = self._plain_num_generating
        return self._steps_since_plain < STALE_STEPS and measured <= 2 * num_generating <= 4 * measured


def _mean(mean: float, value: float) -> float:
    return mean + WEIGHT * (min(value, MAX_JUMP * mean) - mean) if mean else value
