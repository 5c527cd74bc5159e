"""How many tokens of newcomers' prompts a step may carry beside the tokens of those who generate. Pure.

A step that reads prompt tokens takes longer, and everybody who generates waits for it. So the prompt is cut into parts
that keep a step within a bound (Sarathi-Serve, Agrawal et al., OSDI'24; there the part is fixed by profiling, here it
follows what steps really took). The model of a step's time is a line: what a step without prompts takes, and so much
for each prompt token.
"""

from __future__ import annotations

from math import inf

GAP_FACTOR = 1.9
"""Without a target of its own, a step may take so many times the usual one: the largest gap that others see is to stay
below twice the usual, and the time varies."""
CROWD_GAP_FACTOR = 4.0
"""Where more wait for their first token than generate, a step may take longer, in proportion, up to this: all wait for
the same computing, and longer steps do more of it in the same time."""
TILE = 4
"""The tokens of a step are a multiple of it where possible: every new number of tokens costs the library a kernel made
for it. Not the 16 rows of matrix units: where there are none, that leaves up to two thirds of a small budget unused."""
LEAST = 8
"""However long they take, before they are cut to tiles: a token a step would read a prompt for ever."""
FIRST_BUDGET = 64
"""Before a step with prompt tokens was measured."""
WEIGHT = 0.2
"""Of the newest measurement in the running means."""
MAX_JUMP = 2.0
"""A step counts as at most so many times what was expected: a stall of the machine says nothing of the next step. One
that takes so many times less shows that a stall was taken for the rule."""
STALE_STEPS = 64
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
        """A step without prompt tokens."""
        self._plain_num_generating = 0
        """In that step; 0: none was measured."""
        self._steps_since_plain = 0
        self._time_by_tokens = self._tokens_squared = 0.0
        """Running means over steps with prompt tokens: what they added times how many they were; how many, squared."""
        self._most_tried = 0
        """Prompt tokens of one step; 0: none was measured."""

    def tokens(self, num_generating: int, num_waiting: int = 1) -> int:
        """For all of those who wait for their first token together, at most `max_tokens`.

        0: not now, a step without prompts is to be measured first.
        """
        if num_generating == 0 or self._itl_target_s == inf:
            return self._max_tokens
        # After a plain step it is a prompt's turn in any case, also where readers lag and catch up by turns.
        has_just_measured = self._plain_num_generating and not self._steps_since_plain
        if not (has_just_measured or self._knows_plain_step(num_generating)):
            return 0
        if self._itl_target_s is None:
            crowd = max(1.0, num_waiting / num_generating)
            room_s = min((GAP_FACTOR - 1) * crowd, CROWD_GAP_FACTOR - 1) * self._plain_step_s
        else:
            room_s = self._itl_target_s - self._plain_step_s
        # Twice what was tried: where a few tokens take no time that can be seen, many may.
        wanted: float = min(max(FIRST_BUDGET, 2 * self._most_tried), self._max_tokens)
        if self._token_s:
            wanted = min(wanted, max(LEAST, room_s / self._token_s))
        in_whole_tiles = int(num_generating + wanted) // TILE * TILE - num_generating
        if in_whole_tiles < TILE // 2:  # where `max_tokens` is less than a tile
            in_whole_tiles += TILE
        return min(in_whole_tiles, self._max_tokens)

    def note(self, num_generating: int, num_prompt_tokens: int, step_s: float) -> None:
        """A step has ended."""
        if not num_generating:
            return
        if num_prompt_tokens:
            self._note_mixed(num_prompt_tokens, step_s)
            return
        if self._knows_plain_step(num_generating) and MAX_JUMP * step_s > self._plain_step_s:
            self._plain_step_s += WEIGHT * (min(step_s, MAX_JUMP * self._plain_step_s) - self._plain_step_s)
        else:
            self._plain_step_s = step_s
        self._plain_num_generating = num_generating
        self._steps_since_plain = 0

    def _note_mixed(self, num_tokens: int, step_s: float) -> None:
        self._steps_since_plain += 1
        if not self._plain_num_generating:
            return
        expected_s = self._plain_step_s + self._token_s * num_tokens
        if MAX_JUMP * step_s < expected_s:
            self._plain_num_generating = self._most_tried = 0
            self._time_by_tokens = self._tokens_squared = 0.0
            return
        weight = WEIGHT if self._most_tried else 1.0
        believed_s = min(step_s, MAX_JUMP * expected_s) if self._most_tried else step_s
        added_s = max(0.0, believed_s - self._plain_step_s)
        self._time_by_tokens += weight * (added_s * num_tokens - self._time_by_tokens)
        self._tokens_squared += weight * (num_tokens**2 - self._tokens_squared)
        self._most_tried = max(self._most_tried, num_tokens)

    @property
    def _token_s(self) -> float:
        """What a prompt token adds; 0: nothing, as far as one knows.

        By least squares: the few tokens at a prompt's end cost more each, for the pass has a price of its own, and
        count for little.
        """
        return self._time_by_tokens / self._tokens_squared if self._tokens_squared else 0.0

    def _knows_plain_step(self, num_generating: int) -> bool:
        measured = self._plain_num_generating
        return self._steps_since_plain < STALE_STEPS and measured <= 2 * num_generating <= 4 * measured
