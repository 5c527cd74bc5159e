"""The speed of the engine: seconds to the first token, and seconds per token after it."""

from __future__ import annotations

from collections import deque


class TokenPace:
    """Seconds per token of one generation, as a function of the number of running generations.

    There is one recent mean for each number of running generations, and a linear fit through the means for a number
    that was not measured.
    """

    MEMORY_TOKENS = 4000
    """The weight of a mean is halved whenever it has reached this number of tokens.

    Large, because the prefill of a new request delays the other generations: with 400 tokens a mean covers one or two
    prefills, and estimates were up to a fifth worse where all generations share one processor.
    """
    MIN_TOKENS = 20
    MAX_MEANS = 256

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # num_running -> tokens, seconds

    def add(self, tokens: int, seconds: float, num_running: int) -> None:
        old_tokens, old_seconds = self._seen.get(num_running, (0.0, 0.0))
        if old_tokens >= self.MEMORY_TOKENS:
            old_tokens, old_seconds = old_tokens / 2, old_seconds / 2
        self._seen[num_running] = (old_tokens + tokens, old_seconds + seconds)
        if len(self._seen) > self.MAX_MEANS:
            del self._seen[next(iter(self._seen))]

    def seconds_per_token(self, num_running: int) -> float:
        """0 before the first measurements."""
        tokens, seconds = self._seen.get(num_running, (0.0, 0.0))
        if tokens >= self.MIN_TOKENS:
            return seconds / tokens
        known = [(n, t, s / t) for n, (t, s) in self._seen.items() if t >= self.MIN_TOKENS]
        if not known:
            return 0.0
        total = sum(t for _, t, _ in known)
        mean_n = sum(n * t for n, t, _ in known) / total
        mean_s = sum(s * t for _, t, s in known) / total
        spread = sum(t * (n - mean_n) ** 2 for n, t, _ in known)
        slope = sum(t * (n - mean_n) * (s - mean_s) for n, t, s in known) / spread if spread > 0 else 0.0
        # Never below the fastest measured mean: the slope of a fit through noise is arbitrary.
        return max(mean_s + max(0.0, slope) * (num_running - mean_n), min(s for _, _, s in known))


class Prefill:
    """Seconds from start to first token: a constant plus a cost per prompt token.

    The cost is Theil's slope (1950), from disjoint pairs half a window apart. The constant is the mean of the
    residuals, with outliers clamped to 5 median deviations. So one prefill in ten may be an outlier, such as a cold
    start or a cache hit.
    """

    WINDOW = 128

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self._is_dirty = False
        self._constant_s = 0.0
        self._per_token_s = 0.0
        self._mean_s = 0.0
        self._variance = 0.0

    def add(self, prompt_tokens: int, seconds: float) -> None:
        self._seen.append((prompt_tokens, seconds))
        self._is_dirty = True

    def seconds(self, prompt_tokens: int) -> float:
        """0 before the first measurement."""
        self._fit()
        return self._constant_s + self._per_token_s * prompt_tokens

    def typical_s(self) -> tuple[float, float]:
        """Mean and variance over the recent prompts, for a request that has not arrived yet."""
        self._fit()
        return self._mean_s, self._variance

    def _fit(self) -> None:
        if not self._is_dirty:
            return
        self._is_dirty = False
        seen = sorted(self._seen)
        half = len(seen) // 2
        pairs = zip(seen[:half], seen[-half:] if half else [], strict=True)
        slopes = [(s2 - s1) / (n2 - n1) for (n1, s1), (n2, s2) in pairs if n2 > n1]
        self._per_token_s = max(0.0, _median(slopes)) if slopes else 0.0
        rest = [s - self._per_token_s * n for n, s in seen]
        middle = _median(rest)
        reach = 5 * _median([abs(r - middle) for r in rest])
        self._constant_s = max(0.0, sum(min(max(r, middle - reach), middle + reach) for r in rest) / len(rest))
        fitted = [self._constant_s + self._per_token_s * n for n, _ in seen]
        self._mean_s = sum(fitted) / len(fitted)
        self._variance = sum((s - self._mean_s) ** 2 for s in fitted) / len(fitted)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
