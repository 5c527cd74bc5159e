"""From logits to the next token of every row, all rows at once, on the model's device.

Order and meaning are those of Hugging Face's `generate`: token mask, repetition penalty, then temperature, top-k,
top-p, min-p. OpenAI's two penalties come between, as in vLLM: after the repetition penalty, before the temperature.
(vLLM puts min-p before top-p, so that top-p counts within what min-p left.)

Each sampled token costs its request one uniform number of its own generator, turned into a token through the cumulative
probabilities; what a row draws depends on nothing but its own logits, parameters and seed, whoever else is in the
batch. (Equal logits, of which half precision has many, come in an order that follows the number of candidates looked
at; so that is the row's own.) The logits themselves are rounded a little differently in batches of different size: in
float32 that moves the borders between tokens by about 1e-6, so a seed's text changes with the load about once in a
million tokens; in half precision it often does.
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
"""Tokens looked at first when only top-p is set, eight times as many for a row that does not reach it: on 2 cores,
8 rows of a 152k vocabulary take 3 ms instead of the 52 of sorting all."""
MIN_TOP_K_CANDIDATES = 64
"""Tokens looked at for a top-k of no more; above, the next power of two, so that different ones are drawn together."""
MIN_TEMPERATURE = 1e-5
"""Below this, sampling is greedy in all but name, and float32 would divide by zero."""


class Sampler:
    """How one request's tokens are chosen, and what it has to remember for that."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], token_mask: TokenMask | None = None) -> None:
        """`params.seed` must be set."""
        self.params = params
        assert params.seed is not None
        # Not negative, because Random takes a number and its negative for the same seed.
        self._random = random.Random(params.seed % 2**64)
        self.uniform = self._random.random()
        """In [0, 1): what the next token is drawn with. Another one when that has been chosen."""
        self.penalised: PenalisedTokens | None = None
        if params.repetition_penalty != 1.0:
            self.penalised = PenalisedTokens(prompt_ids)
        elif params.frequency_penalty or params.presence_penalty:
            self.penalised = PenalisedTokens(())
        self.token_mask = token_mask
        self._generated: list[int] = []  # kept for the token mask only

    @property
    def candidates(self) -> tuple[int, bool]:
        """How many of the likeliest tokens to look at, 0 for no order at all, and whether top-k bounds them."""
        top_k = self.params.top_k
        if top_k is not None:
            return max(MIN_TOP_K_CANDIDATES, 1 << (top_k - 1).bit_length()), True
        return (TOP_P_CANDIDATES if self.params.top_p < 1.0 else 0), False

    def allowed(self, vocab_size: int) -> torch.Tensor | None:
        """(vocab_size,), bool, on the CPU: which tokens may come next; None: all.

        Raises `ValueError` when the token mask fails.
        """
        mask = allowed_tokens(self.token_mask, self._generated, vocab_size)
        if mask is None:
            return None
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[: len(mask)] = torch.tensor(mask)
        return allowed

    def note(self, token_id: int) -> None:
        """This token was chosen."""
        self.uniform = self._random.random()
        if self.penalised is not None:
            self.penalised.add(token_id)
        if self.token_mask is not None:
            self._generated.append(token_id)


class PenalisedTokens:
    """The tokens that one request's penalties are about: a few hundred, where the vocabulary is a hundred thousand."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._index = {token_id: n for n, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self.ids = torch.tensor([*self._index], dtype=torch.int64)  # (n,), on the CPU, each once
        self.counts = torch.zeros(len(self._index))  # (n,), float32, on the CPU: how often in the answer

    def add(self, token_id: int) -> None:
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self.ids):
            self.ids = torch.cat([self.ids, torch.tensor([token_id])])
            self.counts = torch.cat([self.counts, torch.zeros(1)])
        self.counts[index] += 1


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[SampledToken | Exception]:
    """The next token of each row of logits, (B, vocab_size) in any float type; of a row that failed, why.

    -inf is a finite row's way to forbid a token; NaN, +inf or nothing but -inf is a failure of the model. A token mask
    that fails is one of its row alone. Whatever is raised, for want of memory for example, has changed neither the
    logits nor the samplers.
    """
    # A copy if they are going to be changed.
    logits = logits.to(torch.float32, copy=any(s.token_mask is not None or s.penalised is not None for s in samplers))
    failures = _mask(logits, samplers)
    logprobs = _Logprobs(logits, samplers)
    _penalise(logits, samplers)
    is_finite = logits.amax(dim=-1).isfinite()  # (B,): a NaN or +inf anywhere is the maximum too
    tokens = logits.argmax(dim=-1)  # (B,), int64
    drawing: dict[tuple[int, bool], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.params.temperature > 0:
            drawing.setdefault(sampler.candidates, []).append(row)
    for (num_candidates, has_top_k), rows in drawing.items():
        chosen = [samplers[row] for row in rows]
        where = on_device(rows, logits.device)
        # Where all rows are drawn in one way, a copy would take as long as a pass over them.
        own = logits if len(rows) == len(samplers) else logits[where]
        tokens[where] = draw_filtered(own, chosen, num_candidates, has_top_k) if num_candidates else _draw(own, chosen)
    logprobs.choose(tokens)
    # Waits for the device: the log probabilities are ready then, too.
    tokens_read = torch.stack([tokens, is_finite.long()], dim=-1).tolist()
    told = logprobs.read()
    results: list[SampledToken | Exception] = []
    for row, (sampler, (token, is_good)) in enumerate(zip(samplers, tokens_read, strict=True)):
        if row in failures:
            results.append(failures[row])
        elif not is_good:
            results.append(ArithmeticError("the model's logits are not finite"))
        else:
            sampler.note(token)
            results.append(SampledToken(token, *told.get(row, ())))
    return results


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(B, 1), in the type and on the device of `like`"""
    return on_device(values, like.device, like.dtype)[:, None]


def _mask(logits: torch.Tensor, samplers: Sequence[Sampler]) -> dict[int, Exception]:
    """Put -inf for tokens that may not come. The failure of each row whose token mask failed."""
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
        where = on_device([*masks], logits.device)
        may_come = torch.stack([*masks.values()]).to(logits.device)
        logits[where] = logits[where].masked_fill_(~may_come, -torch.inf)
    return failures


def _penalise(logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    """Make tokens that have come less likely. Costs as much as there are such tokens, not as the vocabulary is large.

    Repetition: Keskar et al. 2019, as in Hugging Face: positive logits divided, negative ones multiplied. Frequency
    and presence: as in the OpenAI API, https://platform.openai.com/docs/api-reference/chat/create.
    """
    penalised = {row: s.penalised for row, s in enumerate(samplers) if s.penalised is not None}
    if not penalised:
        return
    # (n,), for the n tokens of all rows: put together on the CPU, used on the device.
    lengths = torch.tensor([len(tokens.ids) for tokens in penalised.values()])
    rows = torch.tensor([*penalised]).repeat_interleave(lengths)
    ids = torch.cat([tokens.ids for tokens in penalised.values()])
    counts = torch.cat([tokens.counts for tokens in penalised.values()])
    params = [samplers[row].params for row in penalised]
    penalties = torch.tensor([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
    repetition, frequency, presence = penalties.repeat_interleave(lengths, dim=0).unbind(-1)
    subtracted = frequency * counts + presence * (counts > 0)
    is_known = ids < logits.shape[-1]  # some models have embeddings for more tokens than they can say
    rows, ids, repetition, subtracted = (
        values[is_known].to(logits.device) for values in (rows, ids, repetition, subtracted)
    )
    before = logits[rows, ids]
    logits[rows, ids] = torch.where(before < 0, before * repetition, before / repetition) - subtracted


class _Logprobs:
    """What some rows ask to be told, computed on the device and read at the end."""

    def __init__(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
        """`logits`: (B, vocab_size), before anything but the token mask."""
        self._num_best = {row: n for row, s in enumerate(samplers) if (n := s.params.logprobs) is not None}
        if self._num_best:
            self._where = on_device([*self._num_best], logits.device)  # (R,)
            self._all = logits[self._where].log_softmax(dim=-1)  # (R, vocab_size)
            # The same number whoever asks, so that the order of equally likely tokens is the same too.
            self._best = self._all.topk(min(SamplingParams.MAX_LOGPROBS, logits.shape[-1]), dim=-1)  # (R, at most 20)

    def choose(self, tokens: torch.Tensor) -> None:
        """`tokens`: (B,), those that were chosen. Does not wait for the device."""
        if self._num_best:
            self._chosen = self._all.gather(-1, tokens[self._where, None])[:, 0]  # (R,)

    def read(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """By row: `SampledToken.logprob`, `SampledToken.top_logprobs`."""
        if not self._num_best:
            return {}
        best, ids = (values.tolist() for values in self._best)
        told = {}
        for (row, num_best), logprob, *pairs in zip(
            self._num_best.items(), self._chosen.tolist(), ids, best, strict=True
        ):
            likeliest = [*zip(*pairs, strict=True)][:num_best]
            told[row] = logprob, tuple((token, value) for token, value in likeliest if value > -math.inf)
        return told


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B,), from all tokens: no order is needed, so nothing is sorted."""
    weights = _weights(logits, logits.amax(dim=-1, keepdim=True), samplers)
    if any(s.params.min_p > 0 for s in samplers):
        weights.masked_fill_(weights < _column([s.params.min_p for s in samplers], weights), 0.0)
    return _invert(weights, samplers)


def draw_filtered(
    logits: torch.Tensor, samplers: Sequence[Sampler], num_candidates: int, has_top_k: bool
) -> torch.Tensor:
    """(B,), from the likeliest tokens: at most top_k, of those as few as reach top_p, and of those min_p.

    `has_top_k`: all rows have one, of at most `num_candidates`. Otherwise none has, and the device is waited for.
    """
    vocab_size = logits.shape[-1]
    num_candidates = min(num_candidates, vocab_size)
    best, ids = logits.topk(num_candidates, dim=-1)  # (B, num_candidates), likeliest first
    weights = _weights(best, best[:, :1], samplers)
    if has_top_k:
        top_k = _column([min(s.params.top_k or vocab_size, vocab_size) for s in samplers], logits)
        weights.masked_fill_(torch.arange(num_candidates, device=logits.device) >= top_k, 0.0)
    cumulative = weights.cumsum(dim=-1)
    # top-p counts within what top-k left.
    total = cumulative[:, -1:] if has_top_k else _weights(logits, best[:, :1], samplers).sum(dim=-1, keepdim=True)
    top_p = _column([s.params.top_p for s in samplers], logits)
    min_p = _column([s.params.min_p for s in samplers], logits)
    # What the likelier ones have together is below top_p for the token that crosses it, and so for the first one.
    is_kept = (cumulative - weights < top_p * total) & (weights >= min_p)
    tokens = ids.gather(-1, _invert(weights.where(is_kept, 0.0), samplers)[:, None])[:, 0]
    if not has_top_k and num_candidates < vocab_size:
        rows = is_kept[:, -1].nonzero()[:, 0]  # there may be more that belong to them
        if len(rows):
            further = [samplers[row] for row in rows.tolist()]
            tokens[rows] = draw_filtered(logits[rows], further, 8 * num_candidates, has_top_k)
    return tokens


def _weights(logits: torch.Tensor, maximum: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B, n), a new one: probabilities in proportion, at each row's temperature; 1 for a logit that is its maximum.

    The maximum goes first, so that a small temperature cannot overflow.
    """
    temperature = _column([max(s.params.temperature, MIN_TEMPERATURE) for s in samplers], logits)
    return (logits - maximum).div_(temperature).exp_()


def _invert(weights: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(B,): the index at which each row's cumulative weight first exceeds its uniform share of the total."""
    cumulative = weights.cumsum(dim=-1)  # (B, n), float32
    total = cumulative[:, -1:].contiguous()
    target = _column([s.uniform for s in samplers], weights) * total
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the total itself; then it is the last index that added anything.
    last = torch.searchsorted(cumulative, total).clamp_(max=weights.shape[-1] - 1)
    return torch.minimum(index, last)[:, 0]
