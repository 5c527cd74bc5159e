"""The distribution of answer lengths in tokens, from generations that have ended.

The predicted quantity is the number of tokens that a request generates before it ends, for whatever reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from itertools import accumulate, pairwise
from math import log, log1p, sqrt

NUM_DRAWS = 47
"""Each distribution is represented by the means of this number of slices of equal probability."""

ROUNDING = 1e-6
"""Rounding error of a mean of logarithms, so that equal lengths are not a change."""

_LEVELS = [i / NUM_DRAWS for i in range(NUM_DRAWS + 1)]


def _mean_excess_of_slice(lower: float, upper: float) -> float:
    """The mean of an exponential variable of mean 1 between its quantiles `lower` and `upper`."""

    def above(level: float) -> float:  # the integral of the quantile function from `level` to 1
        return (1 - level) * (1 - log(1 - level)) if level < 1 else 0.0

    return (above(lower) - above(upper)) / (upper - lower)


EXPONENTIAL = [_mean_excess_of_slice(a, b) for a, b in pairwise(_LEVELS)]


class Lengths:
    """The lengths of the `window` most recent generations of one source.

    An answer that reached `max_new_tokens` (`is_cut`) would have been longer: it is a censored observation, and its
    weight is moved to the longer ones (redistribution to the right, Efron 1967, equal to the estimator of Kaplan and
    Meier). A cancelled generation released its slot at that length, so it counts as an end like any other.

    When recent lengths differ from earlier ones, the earlier ones are dropped (`drop_before_change`, after ADWIN, Bifet
    and Gavaldà 2007), so the estimate follows a change within some 40 generations although the window is long.
    """

    MIN_SINCE_CHANGE = 24
    CHANGE_Z = 4.0
    """A difference of means of this number of standard errors is a change. Measured: one false alarm in 2,400 lengths;
    with 3.5 there are more, and the estimates are worse."""
    CHECK_EVERY = 8

    def __init__(self, window: int) -> None:
        # 2 * length + is_cut: sorts by length, complete answers before cut answers of the same length.
        self._seen: deque[int] = deque(maxlen=window)
        self._unchecked = 0
        self._is_dirty = False
        self._lengths: list[int] = []
        self._mass: list[float] = [0.0]  # cumulated weight up to and including each length; one entry more than lengths
        self._area: list[float] = [0.0]  # sum of length * mass, likewise
        self._unconditional: list[float] = []
        self._tail_excess = 0.0

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, tokens: int, *, is_cut: bool) -> None:
        self._seen.append(2 * tokens + is_cut)
        self._is_dirty = True
        self._unchecked += 1

    def mean(self) -> float:
        self._rebuild()
        return self._area[-1] / self._mass[-1]

    def variance(self) -> float:
        draws = self.draws()
        mean = sum(draws) / NUM_DRAWS
        return sum((draw - mean) ** 2 for draw in draws) / NUM_DRAWS

    def draws(self) -> list[float]:
        """`NUM_DRAWS` equally likely lengths of a request that has not started, ascending. Do not change the list."""
        self._rebuild()
        return self._unconditional

    def draws_beyond(self, tokens: int) -> list[float]:
        """`NUM_DRAWS` equally likely total lengths of a request with `tokens` tokens that continues, ascending.

        When no known answer is longer, the remaining length is exponential. Its mean is the mean excess of the longest
        tenth, or a tenth of `tokens` if that is more.
        """
        self._rebuild()
        first = bisect_right(self._lengths, tokens)
        if first == len(self._lengths):
            mean = max(self._tail_excess, 0.1 * tokens, 1.0)
            return [tokens + mean * share for share in EXPONENTIAL]
        return self._slices(self._mass[first])

    def _slices(self, lower: float) -> list[float]:
        """The means of equal slices of the distribution above the cumulated mass `lower`."""
        lengths, mass, area = self._lengths, self._mass, self._area
        step = (mass[-1] - lower) / NUM_DRAWS
        means, below = [], self._area_up_to(lower)
        for k in range(1, NUM_DRAWS):
            upper = lower + k * step
            i = bisect_right(mass, upper) - 1
            upto = area[i] + (upper - mass[i]) * lengths[i]
            means.append((upto - below) / step)
            below = upto
        means.append((area[-1] - below) / step)
        return means

    def _area_up_to(self, upper: float) -> float:
        i = bisect_right(self._mass, upper) - 1
        return self._area[i] + ((upper - self._mass[i]) * self._lengths[i] if i < len(self._lengths) else 0.0)

    def _rebuild(self) -> None:
        if not self._is_dirty:
            return
        self._is_dirty = False
        self.drop_before_change()
        weight, left = 1.0, len(self._seen)
        lengths, masses = [], []
        for code in sorted(self._seen):
            left -= 1
            if code & 1 and left:
                weight *= (left + 1) / left
            else:  # the longest one counts as complete even if it was cut: there is no longer one
                lengths.append(code >> 1)
                masses.append(weight)
        self._lengths = lengths
        self._mass = [0.0, *accumulate(masses)]
        self._area = [0.0, *accumulate(n * m for n, m in zip(lengths, masses, strict=True))]
        self._unconditional = self._slices(0.0)
        lower = 0.9 * self._mass[-1]
        start = lengths[bisect_right(self._mass, lower) - 1]
        self._tail_excess = (self._area[-1] - self._area_up_to(lower)) / (self._mass[-1] - lower) - start

    def drop_before_change(self) -> bool:
        """Split the window where the means before and after differ most; drop the part before if the difference is
        significant. True when lengths were dropped.

        Compares logarithms, because a change is a factor, and because a few very long answers are not a change.
        """
        if self._unchecked < self.CHECK_EVERY:
            return False
        self._unchecked = 0
        logs = [log1p(code >> 1) for code in self._seen]
        logs.reverse()
        sums, squares = [*accumulate(logs)], [*accumulate(x * x for x in logs)]
        worst_z, keep, after = self.CHANGE_Z, 0, self.MIN_SINCE_CHANGE
        while after + self.MIN_SINCE_CHANGE <= len(logs):
            before = len(logs) - after
            mean_after, mean_before = sums[after - 1] / after, (sums[-1] - sums[after - 1]) / before
            var_after = squares[after - 1] / after - mean_after**2
            var_before = (squares[-1] - squares[after - 1]) / before - mean_before**2
            error = sqrt(max(0.0, var_after) / after + max(0.0, var_before) / before)
            z = abs(mean_after - mean_before) / (error + ROUNDING)
            if z > worst_z:
                worst_z, keep = z, after
            after = after * 5 // 4
        if keep:
            self._seen = deque(list(self._seen)[-keep:], maxlen=self._seen.maxlen)
        return bool(keep)


class LengthHistory:
    """Lengths of all generations, and of those of each recent client.

    Memory is bounded: 1,000 lengths overall, and 200 of each of the 256 most recent clients.
    """

    WINDOW = 1000
    CLIENT_WINDOW = 200
    MIN_OF_CLIENT = 30
    """With fewer lengths of a client, the overall distribution is used."""
    MAX_CLIENTS = 256

    def __init__(self) -> None:
        self.overall = Lengths(self.WINDOW)
        self._clients: OrderedDict[str, Lengths] = OrderedDict()

    def add(self, client: str, tokens: int, *, is_cut: bool) -> None:
        self.overall.add(tokens, is_cut=is_cut)
        if not client:
            return
        lengths = self._clients.get(client)
        if lengths is None:
            lengths = self._clients[client] = Lengths(self.CLIENT_WINDOW)
            if len(self._clients) > self.MAX_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(client)
        lengths.add(tokens, is_cut=is_cut)

    @property
    def num_clients(self) -> int:
        """Number of clients with a history of their own."""
        return len(self._clients)

    def drop_before_change(self) -> None:
        """Drop outdated lengths. Call once before a series of queries."""
        if self.overall.drop_before_change():
            self._clients.clear()  # a client has too few lengths to detect the change itself

    def of(self, client: str) -> Lengths:
        """The lengths of a client, or the overall ones while it has too few."""
        lengths = self._clients.get(client)
        return lengths if lengths is not None and len(lengths) >= self.MIN_OF_CLIENT else self.overall
