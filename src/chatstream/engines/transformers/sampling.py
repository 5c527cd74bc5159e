"""From logits to the next token of every row, all rows at once, on the model's device.

Order and meaning are those of Hugging Face's `generate`: repetition penalty, then temperature, top-k, top-p. Each
sampled token costs its request one uniform number of its own generator, turned into a token through the cumulative
probabilities; what a row draws depends on nothing but its own logits, parameters and seed, whoever else is in the
batch. The logits themselves are rounded a little differently in batches of different size: in float32 that moves the
borders between tokens by about 1e-6, so a seed's text changes with the load about once in a million tokens; in half
precision it often does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from chatstream.engines.model import NextToken
from chatstream.types import SamplingParams

TOP_P_CANDIDATES = 1024
"""Tokens looked at first when only top-p is set, eight times as many whenever that does not reach it: on 2 cores,
8 rows of a 152k vocabulary take 3 ms instead of the 52 of sorting all."""
MIN_TEMPERATURE = 1e-5
"""Below this, sampling is greedy in all but name, and float32 would divide by zero."""


class Sampler:
    """How one request's tokens are chosen, and what it has to remember for that."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        """`params.seed` must be set; the ids must be below `vocab_size`, which is at least the width of the logits."""
        self.params = params
        assert params.seed is not None
        # Not negative, because Random takes a number and its negative for the same seed.
        self._random = random.Random(params.seed % 2**64)
        self.seen: torch.Tensor | None = None  # (vocab_size,), bool, on device
        """Tokens of the prompt and of the answer so far; kept only when they are to be penalised."""
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt_ids, device=device)] = True

    @property
    def is_filtered(self) -> bool:
        return self.params.top_k is not None or self.params.top_p < 1.0

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return self._random.random()

    def note(self, token_id: int) -> None:
        """This token was chosen."""
        if self.seen is not None:
            self.seen[token_id] = True


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[NextToken | ArithmeticError]:
    """The next token of each row of logits, (B, vocab_size) in any float type; an error where a row is not finite.

    -inf is a finite row's way to forbid a token; NaN, +inf or nothing but -inf is a failure of the model.
    """
    logits = _penalised(logits.float(), samplers)
    is_finite = logits.amax(dim=-1).isfinite()  # (B,): a NaN or +inf anywhere is the maximum too
    tokens = logits.argmax(dim=-1)  # (B,), int64
    drawing = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    for is_filtered, choose in ((False, _draw), (True, _draw_filtered)):
        rows = [row for row in drawing if samplers[row].is_filtered == is_filtered]
        if rows:
            chosen = [samplers[row] for row in rows]
            where = torch.tensor(rows, device=logits.device)
            tokens[where] = choose(_tempered(logits[where], chosen), chosen)
    # The one synchronisation with the device.
    results: list[NextToken | ArithmeticError] = []
    for sampler, token, is_good in zip(samplers, *torch.stack([tokens, is_finite.long()]).tolist(), strict=True):
        if is_good:
            sampler.note(token)
        results.append(NextToken(token) if is_good else ArithmeticError("the model's logits are not finite"))
    return results


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(B, 1), in the type and on the device of `like`"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _penalised(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Keskar et al. 2019, as in Hugging Face: seen tokens' logits divided when positive, multiplied when negative."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.seen is not None]
    if not rows:
        return logits
    where = torch.tensor(rows, device=logits.device)
    penalty = _column([samplers[row].params.repetition_penalty for row in rows], logits)
    before = logits[where]
    # Some models have embeddings for more tokens than they can say.
    seen = torch.stack([seen[: before.shape[-1]] for row in rows if (seen := samplers[row].seen) is not None])
    after = torch.where(before < 0, before * penalty, before / penalty)
    return logits.index_copy(0, where, torch.where(seen, after, before))


def _tempered(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Divided by each row's temperature, the maximum moved to 0 first so that a small one cannot overflow."""
    temperature = _column([max(s.params.temperature, MIN_TEMPERATURE) for s in samplers], logits)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B,), from all tokens: no order is needed, so nothing is sorted."""
    return _invert(logits.softmax(dim=-1), samplers)


def _draw_filtered(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B,), from the likeliest tokens: at most top_k, and of those as few as reach top_p."""
    vocab_size = logits.shape[-1]
    top_k = _column([min(s.params.top_k or vocab_size, vocab_size) for s in samplers], logits)
    top_p = _column([s.params.top_p for s in samplers], logits)
    has_top_k = _column([float(s.params.top_k is not None) for s in samplers], logits) > 0
    num_candidates = min(vocab_size, max(s.params.top_k or TOP_P_CANDIDATES for s in samplers))
    while True:
        best, ids = logits.topk(num_candidates, dim=-1)  # (B, num_candidates), likeliest first
        best = best.masked_fill(torch.arange(num_candidates, device=logits.device) >= top_k, -torch.inf)
        # top-p counts within what top-k left, and within everything where there is no top-k.
        total = torch.where(has_top_k, best.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
        probs = (best - total).exp()
        before = probs.cumsum(dim=-1) - probs  # what the likelier ones have together
        if num_candidates == vocab_size or bool((has_top_k | (before[:, -1:] >= top_p)).all()):
            break
        num_candidates = min(8 * num_candidates, vocab_size)
    # The token that crosses top_p is kept, so the first one always is.
    kept = probs.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, _invert(kept, samplers)[:, None])[:, 0]


def _invert(weights: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B,): the index at which each row's cumulative weight first exceeds its uniform share of the total."""
    cumulative = weights.cumsum(dim=-1)  # (B, n), float32
    total = cumulative[:, -1:].contiguous()
    target = _column([s.draw() for s in samplers], weights) * total
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the total itself; then it is the last index that added anything.
    last = torch.searchsorted(cumulative, total).clamp_(max=weights.shape[-1] - 1)
    return torch.minimum(index, last)[:, 0]
