"""Sample the next token of each row of logits, all rows at once, on the model's device.

Order and meaning are those of Hugging Face's `generate`: token mask, repetition penalty, then temperature, top-k,
top-p, min-p. OpenAI's two penalties come between, as in vLLM: after the repetition penalty, before the temperature.
(vLLM applies min-p before top-p, so its top-p counts only the tokens that min-p has kept.)

Each sampled token takes one uniform number from its request's own generator, which selects a token by the cumulative
probabilities. So the token of a row depends on its own logits, parameters and seed only, not on other rows. (The order
of equal logits, which are frequent in half precision, depends on the number of candidates; so each row has its own
number.) The logits themselves are rounded differently in batches of different size. In float32 this moves the borders
between tokens by about 1e-6, so the text of a seed changes with the load about once in a million tokens; in half
precision it often does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import torch

from chatstream.engines.batching.token_mask import allowed_tokens
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.transformers.transfer import on_device
from chatstream.types import SamplingParams, TokenMask

TOP_P_CANDIDATES = 1024
"""Candidates when only top-p is set; eight times as many for a row that they do not suffice for. On 2 cores, 8 rows of
a 152k vocabulary take 3 ms, instead of 52 ms for a sort of all tokens."""
MIN_TOP_K_CANDIDATES = 64
"""Candidates for a top-k up to this; above, the next power of two, so that rows of different top-k are sampled
together."""
MIN_TEMPERATURE = 1e-5
"""Lower temperatures are raised to this: sampling is greedy in effect, and float32 does not divide by zero."""


class Sampler:
    """Sampling parameters and state of one request."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], token_mask: TokenMask | None = None) -> None:
        """`params.seed` must be set."""
        self.params = params
        assert params.seed is not None
        # Modulo, because Random gives a number and its negative the same sequence.
        self._random = random.Random(params.seed % 2**64)
        self.uniform = self._random.random()
        """In [0, 1): the number that the next token is sampled with. Replaced after each token."""
        self.penalised: PenalisedTokens | None = None
        if params.repetition_penalty != 1.0:
            self.penalised = PenalisedTokens(prompt_ids)
        elif params.frequency_penalty or params.presence_penalty:
            self.penalised = PenalisedTokens(())
        self.token_mask = token_mask
        self._generated: list[int] = []  # kept for the token mask only

    @property
    def candidates(self) -> tuple[int, bool]:
        """Number of most likely tokens to sort, 0 to sort none, and whether top-k is at most that number."""
        top_k = self.params.top_k
        if top_k is not None:
            return max(MIN_TOP_K_CANDIDATES, 1 << (top_k - 1).bit_length()), True
        return (TOP_P_CANDIDATES if self.params.top_p < 1.0 else 0), False

    def allowed(self, vocab_size: int) -> torch.Tensor | None:
        """The tokens that may come next: (vocab_size,), bool, on the CPU; None: all.

        Raises `ValueError` when the token mask fails.
        """
        mask = allowed_tokens(self.token_mask, self._generated, vocab_size)
        if mask is None:
            return None
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[: len(mask)] = torch.tensor(mask)
        return allowed

    def add_token(self, token_id: int) -> None:
        """Update the state after this token was sampled."""
        self.uniform = self._random.random()
        if self.penalised is not None:
            self.penalised.add(token_id)
        if self.token_mask is not None:
            self._generated.append(token_id)


class PenalisedTokens:
    """The tokens that one request's penalties apply to: a few hundred of a vocabulary of a hundred thousand."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._index = {token_id: n for n, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self.ids = torch.tensor([*self._index], dtype=torch.int64)  # (n,), on the CPU, without repetitions
        self.counts = torch.zeros(len(self._index))  # (n,), float32, on the CPU: occurrences in the answer

    def add(self, token_id: int) -> None:
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self.ids):
            self.ids = torch.cat([self.ids, torch.tensor([token_id])])
            self.counts = torch.cat([self.counts, torch.zeros(1)])
        self.counts[index] += 1


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[SampledToken | Exception]:
    """Sample the next token of each row of logits, (B, vocab_size) in any float dtype. A row that fails gets an error.

    -inf forbids a token. NaN, +inf or a row of -inf only is an `ArithmeticError` of the row; a failed token mask is a
    `ValueError` of the row. An error that is raised, such as out of memory, leaves logits and samplers unchanged.
    """
    # A copy if `_mask` or `_penalise` will change them.
    logits = logits.to(torch.float32, copy=any(s.token_mask is not None or s.penalised is not None for s in samplers))
    failures = _mask(logits, samplers)
    logprobs = _Logprobs(logits, samplers)
    _penalise(logits, samplers)
    is_finite = logits.amax(dim=-1).isfinite()  # (B,): the maximum of a row with NaN or +inf is not finite
    tokens = logits.argmax(dim=-1)  # (B,), int64
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.params.temperature > 0:
            groups.setdefault(sampler.candidates, []).append(row)
    for (num_candidates, has_top_k), rows in groups.items():
        group = [samplers[row] for row in rows]
        index = on_device(rows, logits.device)
        # Without a copy if all rows are in one group: it would take as long as a pass over them.
        own = logits if len(rows) == len(samplers) else logits[index]
        tokens[index] = draw_filtered(own, group, num_candidates, has_top_k) if num_candidates else _draw(own, group)
    logprobs.select(tokens)
    # Waits for the device; the log probabilities are then ready too.
    tokens_read = torch.stack([tokens, is_finite.long()], dim=-1).tolist()
    logprobs_read = logprobs.read()
    results: list[SampledToken | Exception] = []
    for row, (sampler, (token, is_row_finite)) in enumerate(zip(samplers, tokens_read, strict=True)):
        if row in failures:
            results.append(failures[row])
        elif not is_row_finite:
            results.append(ArithmeticError("the model's logits are not finite"))
        else:
            sampler.add_token(token)
            results.append(SampledToken(token, *logprobs_read.get(row, ())))
    return results


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(B, 1), in the dtype and on the device of `like`."""
    return on_device(values, like.device, like.dtype)[:, None]


def _mask(logits: torch.Tensor, samplers: Sequence[Sampler]) -> dict[int, Exception]:
    """Set the logits of tokens that are not allowed to -inf. Returns the errors of token masks, by row."""
    masks: dict[int, torch.Tensor] = {}
    failures: dict[int, Exception] = {}
    for row, sampler in enumerate(samplers):
        try:
            allowed = sampler.allowed(logits.shape[-1])
        except ValueError as error:
            failures[row] = error
        else:
            if allowed is not None:
                masks[row] = allowed
    if masks:
        index = on_device([*masks], logits.device)
        is_allowed = torch.stack([*masks.values()]).to(logits.device)
        logits[index] = logits[index].masked_fill_(~is_allowed, -torch.inf)
    return failures


def _penalise(logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    """Apply the penalties, in place. The cost grows with the number of penalised tokens, not with the vocabulary.

    Repetition: Keskar et al. 2019, as in Hugging Face: positive logits divided, negative ones multiplied. Frequency
    and presence: as in the OpenAI API, https://platform.openai.com/docs/api-reference/chat/create.
    """
    penalised = {row: s.penalised for row, s in enumerate(samplers) if s.penalised is not None}
    if not penalised:
        return
    # (n,), for the n penalised tokens of all rows: built on the CPU, used on the device.
    lengths = torch.tensor([len(tokens.ids) for tokens in penalised.values()])
    rows = torch.tensor([*penalised]).repeat_interleave(lengths)
    ids = torch.cat([tokens.ids for tokens in penalised.values()])
    counts = torch.cat([tokens.counts for tokens in penalised.values()])
    params = [samplers[row].params for row in penalised]
    penalties = torch.tensor([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
    repetition, frequency, presence = penalties.repeat_interleave(lengths, dim=0).unbind(-1)
    subtracted = frequency * counts + presence * (counts > 0)
    is_known = ids < logits.shape[-1]  # some models have more embeddings than logits
    rows, ids, repetition, subtracted = (
        values[is_known].to(logits.device) for values in (rows, ids, repetition, subtracted)
    )
    before = logits[rows, ids]
    logits[rows, ids] = torch.where(before < 0, before * repetition, before / repetition) - subtracted


class _Logprobs:
    """Log probabilities of the rows that request them, computed on the device and read at the end."""

    def __init__(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
        """`logits`: (B, vocab_size), after the token mask and before penalties."""
        self._num_best = {row: n for row, s in enumerate(samplers) if (n := s.params.logprobs) is not None}
        if self._num_best:
            self._rows = on_device([*self._num_best], logits.device)  # (R,)
            self._all = logits[self._rows].log_softmax(dim=-1)  # (R, vocab_size)
            # Always the same number, so that the order of equally likely tokens is the same for any requested number.
            self._best = self._all.topk(min(SamplingParams.MAX_LOGPROBS, logits.shape[-1]), dim=-1)  # (R, at most 20)

    def select(self, tokens: torch.Tensor) -> None:
        """`tokens`: (B,), the sampled ones. Does not wait for the device."""
        if self._num_best:
            self._sampled = self._all.gather(-1, tokens[self._rows, None])[:, 0]  # (R,)

    def read(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """`SampledToken.logprob` and `SampledToken.top_logprobs`, by row."""
        if not self._num_best:
            return {}
        best, ids = (values.tolist() for values in self._best)
        by_row = {}
        for (row, num_best), logprob, *pairs in zip(
            self._num_best.items(), self._sampled.tolist(), ids, best, strict=True
        ):
            likeliest = [*zip(*pairs, strict=True)][:num_best]
            by_row[row] = logprob, tuple((token, value) for token, value in likeliest if value > -math.inf)
        return by_row


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Sample from all tokens, unsorted. Returns (B,), int64."""
    weights = _weights(logits, logits.amax(dim=-1, keepdim=True), samplers)
    if any(s.params.min_p > 0 for s in samplers):
        weights.masked_fill_(weights < _column([s.params.min_p for s in samplers], weights), 0.0)
    return _invert(weights, samplers)


def draw_filtered(
    logits: torch.Tensor, samplers: Sequence[Sampler], num_candidates: int, has_top_k: bool
) -> torch.Tensor:
    """Sample from the most likely tokens: at most top_k, of those the fewest that reach top_p, of those min_p.

    Returns (B,), int64. `has_top_k`: all rows have a top-k of at most `num_candidates`. False: no row has one, and the
    host waits for the device.
    """
    vocab_size = logits.shape[-1]
    num_candidates = min(num_candidates, vocab_size)
    best, ids = logits.topk(num_candidates, dim=-1)  # (B, num_candidates), likeliest first
    weights = _weights(best, best[:, :1], samplers)
    if has_top_k:
        top_k = _column([min(s.params.top_k or vocab_size, vocab_size) for s in samplers], logits)
        weights.masked_fill_(torch.arange(num_candidates, device=logits.device) >= top_k, 0.0)
    cumulative = weights.cumsum(dim=-1)
    # top-p counts only the tokens that top-k has kept.
    total = cumulative[:, -1:] if has_top_k else _weights(logits, best[:, :1], samplers).sum(dim=-1, keepdim=True)
    top_p = _column([s.params.top_p for s in samplers], logits)
    min_p = _column([s.params.min_p for s in samplers], logits)
    # The sum of more likely tokens is below top_p for the token that crosses top_p, and for the first token.
    is_kept = (cumulative - weights < top_p * total) & (weights >= min_p)
    tokens = ids.gather(-1, _invert(weights.where(is_kept, 0.0), samplers)[:, None])[:, 0]
    if not has_top_k and num_candidates < vocab_size:
        rows = is_kept[:, -1].nonzero()[:, 0]  # all candidates were kept: further tokens may be too
        if len(rows):
            their_samplers = [samplers[row] for row in rows.tolist()]
            tokens[rows] = draw_filtered(logits[rows], their_samplers, 8 * num_candidates, has_top_k)
    return tokens


def _weights(logits: torch.Tensor, maximum: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Unnormalised probabilities at each row's temperature, 1 for the row's maximum: (B, n), a new tensor.

    The maximum is subtracted before the division, so that a small temperature cannot overflow.
    """
    temperature = _column([max(s.params.temperature, MIN_TEMPERATURE) for s in samplers], logits)
    return (logits - maximum).div_(temperature).exp_()


def _invert(weights: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """The index at which each row's cumulative weight first exceeds `uniform` times the total: (B,), int64."""
    cumulative = weights.cumsum(dim=-1)  # (B, n), float32
    total = cumulative[:, -1:].contiguous()
    target = _column([s.uniform for s in samplers], weights) * total
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may make the target equal to the total; the result is then the last index with a positive weight.
    last = torch.searchsorted(cumulative, total).clamp_(max=weights.shape[-1] - 1)
    return torch.minimum(index, last)[:, 0]
