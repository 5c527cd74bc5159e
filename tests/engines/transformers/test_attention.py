"""Each token of a row attends to its own sequence only."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers import attention
from chatstream.engines.transformers.attention import attend, attention_over
from chatstream.engines.transformers.forward import SlotForward
from chatstream.engines.transformers.kv_cache import SlotCache
from tests.engines.transformers import checkpoints

KEY_DIM, VALUE_DIM = 8, 6
Inputs = list[tuple[int, int, int]]
"""(slot, cached tokens, new tokens)"""


class Case:
    """Slots with random keys and values, and a row of new tokens."""

    def __init__(self, inputs: Inputs, *, kv_heads: int, group: int, window: int | None, seed: int) -> None:
        self.inputs = inputs
        self.kv_heads, self.group, self.window = kv_heads, group, window
        self.random = torch.Generator().manual_seed(seed)
        self.cache = SlotCache(windows=[window], max_len=10_000, device=torch.device("cpu"))
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        before = [(slot, 0, cached) for slot, cached, _ in inputs if cached]
        # Slots that are not in use still contain the data of an earlier sequence.
        in_use = {slot for slot, _, _ in inputs}
        before += [(slot, 0, 5) for slot in range(max(in_use)) if slot not in in_use]
        if before:
            self.write(before)
        self.memory = self.write(inputs)
        self.query = self.draw(1, kv_heads * group, sum(count for _, _, count in inputs), KEY_DIM)
        self.sinks = self.draw(kv_heads * group)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def write(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        placed = self.cache.place([SlotInput(slot, start, (0,) * count, is_last=True) for slot, start, count in inputs])
        num_tokens = len(placed.slots)
        key = self.draw(1, self.kv_heads, num_tokens, KEY_DIM)
        value = self.draw(1, self.kv_heads, num_tokens, VALUE_DIM)
        first = 0
        for slot, _, count in inputs:
            for kept, new in ((self.keys, key), (self.values, value)):
                parts = [kept[slot]] if slot in kept else []
                kept[slot] = torch.cat([*parts, new[0, :, first : first + count]], dim=1)
            first += count
        return self.cache.update(key, value, 0)

    def attended(self, **options: Any) -> torch.Tensor:
        model: Any = SimpleNamespace(config=LlamaConfig())
        with attention_over(self.cache, model):
            output, weights = attend(
                torch.nn.Module(), self.query, *self.memory, None, sliding_window=self.window, **options
            )
        assert weights is None
        return output

    def naive(self, scale: float = KEY_DIM**-0.5, softcap: float | None = None, sinks: bool = False) -> torch.Tensor:
        """Token by token and head by head, in float64."""
        rows = []
        first = 0
        for slot, cached, count in self.inputs:
            for n in range(count):
                at = cached + n
                begin = 0 if self.window is None else max(0, at - self.window + 1)
                heads = []
                for head in range(self.kv_heads * self.group):
                    key = self.keys[slot][head // self.group, begin : at + 1].double()
                    value = self.values[slot][head // self.group, begin : at + 1].double()
                    scores = key @ self.query[0, head, first + n].double() * scale
                    if softcap is not None:
                        scores = (scores / softcap).tanh() * softcap
                    if sinks:
                        scores = torch.cat([scores, self.sinks[head : head + 1].double()])
                    weights = scores.softmax(0)[: at + 1 - begin]
                    heads.append(weights @ value)
                rows.append(torch.stack(heads))
            first += count
        return torch.stack(rows)[None]


@st.composite
def rows(draw: st.DrawFn) -> Inputs:
    """Decodes and parts of prompts, in any slots and any order."""
    slots = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True))
    if draw(st.booleans()):
        slots.sort()  # so that neighbouring slots form runs
    return [
        (slot, draw(st.integers(0, 40)), draw(st.sampled_from([1, 1, 1, 2, 5, 17])))
        for slot in slots
    ]  # fmt: skip


CASES = {
    "inputs": rows(),
    "kv_heads": st.sampled_from([1, 2, 3]),
    "group": st.sampled_from([1, 2, 7]),
    "window": st.sampled_from([None, 1, 4, 30]),
    "seed": st.integers(0, 2**32),
}


@settings(max_examples=60, deadline=None)
@given(softcap=st.sampled_from([None, 2.0]), has_sinks=st.booleans(), scale=st.sampled_from([None, 0.3]), **CASES)
def test_attention_equals_that_of_each_sequence_alone(
    inputs: Inputs,
    kv_heads: int,
    group: int,
    window: int | None,
    seed: int,
    softcap: float | None,
    has_sinks: bool,
    scale: float | None,
) -> None:
    case = Case(inputs, kv_heads=kv_heads, group=group, window=window, seed=seed)
    attended = case.attended(scaling=scale, softcap=softcap, s_aux=case.sinks if has_sinks else None)
    expected = case.naive(KEY_DIM**-0.5 if scale is None else scale, softcap, has_sinks)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)


def test_neighbouring_decodes_and_a_prompt_attend_in_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = attention.scaled_dot_product_attention

    def counted(queries: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(tuple(queries.shape))
        return real(queries, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    inputs = [(slot, 30 + slot, 1) for slot in range(4)] + [(4, 0, 17)]
    case = Case(inputs, kv_heads=2, group=3, window=None, seed=0)
    torch.testing.assert_close(case.attended().double(), case.naive(), atol=1e-5, rtol=1e-5)
    assert calls == [(4, 2, 3, KEY_DIM), (1, 2, 3 * 17, KEY_DIM)]


# --- the model between steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_loaded_model_can_be_used_by_its_owner_between_steps(checkpoint: Callable[[str], Path], kind: str) -> None:
    model = checkpoints.load_reference(checkpoint(kind))
    prompt = tuple(random.Random(0).choices(range(10, 300), k=12))
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        forward = SlotForward(model, checkpoints.CONTEXT_LEN)
        tokens: list[int] = []
        for _ in range(8):
            cached = len(prompt) + len(tokens) - 1 if tokens else 0
            item = SlotInput(0, cached, (*prompt, *tokens)[cached:], is_last=True)
            tokens.append(int(forward.logits_after([item])[0].argmax()))
            between = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            assert torch.equal(between, expected)
    assert tokens[: expected.shape[1] - 12] == expected[0, 12:].tolist()


def test_a_failed_pass_restores_the_models_own_attention(checkpoint: Callable[[str], Path]) -> None:
    model = checkpoints.load_reference(checkpoint("llama"))
    before = model.config._attn_implementation
    with torch.inference_mode(), pytest.raises(IndexError):
        SlotForward(model, checkpoints.CONTEXT_LEN).logits_after([SlotInput(0, 0, (10**6,), is_last=True)])
    assert model.config._attn_implementation == before


# --- shapes, on the meta device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", checkpoints.BATCHED)
def test_a_mixed_step_reads_no_value_from_the_device(kind: str) -> None:
    """Tensors on the `meta` device have no values, so a step that reads one, which blocks on a GPU, fails."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            checkpoints.CONFIGS[kind](384), dtype=torch.bfloat16
        ).eval()
    forward = SlotForward(model, checkpoints.CONTEXT_LEN)
    with torch.inference_mode():
        for inputs in (
            [(0, 0, 20)],
            [(0, 20, 1), (1, 0, 30)],
            [(0, 21, 1), (1, 30, 1), (4, 0, 7)],
            [(0, 22, 1), (1, 31, 1), (2, 0, 5), (4, 7, 3)],
        ):
            made = [SlotInput(slot, start, (1,) * count, is_last=True) for slot, start, count in inputs]
            logits = forward.logits_after(made)
            assert logits.shape == (len(inputs), 384)
            assert logits.device.type == "meta"
        forward.copy(0, 5, 20)
        forward.clear(4, 10)
    assert forward.bytes_per_token > 0
    assert forward.cache.layers[0].memories[0].tensor.shape[:1] == (6,)
