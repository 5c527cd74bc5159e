"""Packed layers give the results of plain ones, and are used only where they are supported and faster."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chatstream.engines.transformers import prepack as prepack_module
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.engines.transformers.prepack import (
    PackedLinear,
    packing_obstacle,
    prepack,
    reordered,
    unpack_read_layers,
)
from chatstream.errors import ConfigError
from tests.engines.transformers import checkpoints
from tests.engines.transformers.recording import engine_on, mixed_requests, run_all

pytestmark = pytest.mark.anyio

ON = LoadSettings(device="cpu", prepack="on")


def _can_pack(dtype: torch.dtype) -> bool:
    return packing_obstacle(nn.Sequential(nn.Linear(8, 8, dtype=dtype)), must_gain=False) is None


float32 = pytest.param(
    torch.float32, marks=pytest.mark.skipif(not _can_pack(torch.float32), reason="no oneDNN in this torch")
)
bfloat16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not _can_pack(torch.bfloat16), reason="no bfloat16 in this processor")
)
dtypes = pytest.mark.parametrize("dtype", [float32, bfloat16])
needs_float32 = float32.marks[0]


def num_packed(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


# --- one layer ----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (3, 5), (17, 33), (64, 32), (1000, 1), (384, 31)])
@torch.inference_mode()
def test_a_packed_layer_gives_the_results_of_the_plain_one(
    num_out: int, num_in: int, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(num_in, num_out, bias=has_bias, dtype=dtype)
    packed = PackedLinear(reordered(plain.weight), plain.bias)
    for shape in [(num_in,), (1, num_in), (2, 3, num_in), (1, 8, num_in), (1, 33, num_in), (256, num_in), (0, num_in)]:
        rows = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(packed(rows), plain(rows))
    columns = torch.randn(num_in, 4, dtype=dtype).t()  # rows that are not contiguous
    torch.testing.assert_close(packed(columns), plain(columns))


@dtypes
def test_an_unpacked_weight_equals_the_original(dtype: torch.dtype) -> None:
    plain = nn.Linear(33, 17, dtype=dtype)
    packed = PackedLinear(reordered(plain.weight), plain.bias)
    assert torch.equal(packed.weight, plain.weight)
    again = packed.unpacked()
    assert torch.equal(again.weight, plain.weight)
    assert again.bias is plain.bias
    assert repr(packed) == "PackedLinear(in_features=33, out_features=17, bias=True)"


# --- a model ------------------------------------------------------------------------------------------------------


@needs_float32
@pytest.mark.parametrize("kind", checkpoints.BATCHED + checkpoints.ONE_BY_ONE)
async def test_greedy_tokens_of_a_packed_model_are_those_of_generate(
    kind: str, checkpoint: Callable[[str], Path], expected: Callable[..., list[list[int]]]
) -> None:
    requests = mixed_requests(len(checkpoints.train_tokenizer()))
    shuffled = random.Random(1).sample(requests, len(requests))
    async with engine_on(checkpoint(kind), ON, max_prompt_tokens_per_step=7) as bench:
        await run_all(bench.engine, shuffled, 4)
        assert [bench.recorder.tokens_of(request.prompt.token_ids) for request in requests] == expected(kind)


@dtypes
def test_only_plain_linear_layers_are_packed(dtype: torch.dtype) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Embedding(4, 8), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)]), Special(8, 8), nn.Linear(8, 8)
    ).to(dtype)
    model[4].half()
    model.add_module("nowhere", nn.Linear(8, 8, device="meta"))
    prepack(model)
    assert num_packed(model) == 2
    assert isinstance(model[1], PackedLinear)
    assert isinstance(model[2][0], PackedLinear)


@needs_float32
def test_shared_weights_are_packed_once_and_an_embedding_keeps_its_own() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b", "head")})
    model["again"] = nn.Sequential(model["a"])  # the same layer
    model["b"].weight = model["a"].weight  # another one with the same weight
    model["embedding"] = nn.Embedding(8, 8)
    model["head"].weight = model["embedding"].weight
    table = model["embedding"].weight.clone()
    done: list[int] = []
    prepack(model, done.append)
    assert done == [256, 256]
    assert model["a"].packed is model["again"][0].packed is model["b"].packed is not model["head"].packed
    assert torch.equal(model["embedding"].weight, table)
    assert torch.equal(model["head"].weight, table)


@needs_float32
def test_plain_weights_are_released_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    in_both_forms: list[int] = []

    def watched(weight: torch.Tensor) -> torch.Tensor:
        num_plain = sum(isinstance(layer, nn.Linear) for layer in model)
        in_both_forms.append(num_plain + num_packed(model) - len(model))
        return reordered(weight)

    monkeypatch.setattr(prepack_module, "reordered", watched)
    before = [weight.data_ptr() for weight in model.parameters()]
    prepack(model)
    assert in_both_forms == [0] * 5
    assert [weight.data_ptr() for weight in model.parameters()] == before[1::2], "a plain weight was kept"


class ReadsWeight(nn.Module):
    """Reads the weight of one layer directly, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.called(nn.functional.linear(x, self.used.weight, self.used.bias))
        return y


@needs_float32
@torch.inference_mode()
def test_a_layer_with_a_weight_that_is_read_directly_becomes_plain_after_the_trial() -> None:
    model = ReadsWeight()
    rows = torch.randn(2, 8)
    expected = model(rows)
    prepack(model)
    torch.testing.assert_close(model(rows), expected)
    unpack_read_layers(model)
    assert type(model.used) is nn.Linear
    assert isinstance(model.called, PackedLinear)
    torch.testing.assert_close(model(rows), expected)


@needs_float32
def test_the_loader_unpacks_layers_after_the_trial(checkpoint: Callable[[str], Path]) -> None:
    """Mamba reads the weights of `dt_proj`, and the dtype of the weight of `lm_head`."""
    model = load(str(checkpoint("mamba")), None, ON).runner.forward.model  # type: ignore[attr-defined]
    plain = {name.split(".")[-1] for name, layer in model.named_modules() if type(layer) is nn.Linear}
    packed = {name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert plain == {"dt_proj", "lm_head"}
    assert packed == {"in_proj", "x_proj", "out_proj"}


# --- obstacles ----------------------------------------------------------------------------------------------------


def test_a_model_without_suitable_layers_is_not_packed() -> None:
    reason = "it has no linear layers in bfloat16 or float32 on the CPU"
    assert packing_obstacle(nn.Sequential(nn.Embedding(4, 4))) == reason
    assert packing_obstacle(nn.Sequential(nn.Linear(4, 4).half()), must_gain=False) == reason


@needs_float32
def test_a_small_model_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    assert packing_obstacle(model) == "it is small enough to stay in the processor's cache"
    assert packing_obstacle(model, must_gain=False) is None


@needs_float32
@pytest.mark.parametrize(("gains", "is_worth_it"), [((1.1, 1.4), True), ((0.7, 1.9), False), ((1.5, 1.0), False)])
def test_packing_must_be_faster_with_one_token_a_step_and_with_several(
    gains: tuple[float, float], is_worth_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepack_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(prepack_module, "_gain", lambda plain, packed, num_rows: gains[num_rows == 8])
    reason = packing_obstacle(nn.Sequential(nn.Linear(16, 16)))
    assert (reason is None) == is_worth_it
    gain_1, gain_8 = gains
    message = f"it gains too little here ({gain_1:.2f} times as fast with 1 token a step, {gain_8:.2f} with 8)"
    assert reason in (None, message)


@needs_float32
def test_the_best_time_of_each_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine only adds time, to some layer of some round."""
    rounds_s = {nn.Linear: [[1.0, 9.0], [4.0, 2.0], [8.0, 8.0]], PackedLinear: [[2.0, 6.0], [4.0, 3.0], [9.0, 9.0]]}
    both = {kind: iter(2 * times_s) for kind, times_s in rounds_s.items()}  # with 1 row, then with 8
    monkeypatch.setattr(prepack_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(prepack_module, "_ROUNDS", 3)
    monkeypatch.setattr(prepack_module, "layer_times_s", lambda layers, inputs: next(both[type(layers[0])]))
    assert packing_obstacle(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))) == (
        "it gains too little here (0.60 times as fast with 1 token a step, 0.60 with 8)"
    )


def test_each_layer_is_timed() -> None:
    layers = [nn.Linear(8, 4), nn.Linear(5, 3)]
    times_s = prepack_module.layer_times_s(layers, [torch.ones(2, 8), torch.ones(2, 5)])
    assert len(times_s) == 2
    assert min(times_s) > 0


@needs_float32
def test_layers_that_give_different_results_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack_module, "reordered", lambda weight: reordered(weight * 1.001))
    assert packing_obstacle(nn.Sequential(nn.Linear(16, 16))) == "packed layers give different results"


@pytest.mark.parametrize("error", [RuntimeError("no bf16 here\nmore"), AttributeError("no such operator")])
def test_without_the_operators_nothing_is_packed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(weight: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(prepack_module, "reordered", fails)
    expected = f"this torch or this processor does not support it: {str(error).splitlines()[0]}"
    assert packing_obstacle(nn.Sequential(nn.Linear(16, 16))) == expected


@needs_float32
def test_weights_that_are_not_finite_are_not_packed() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data.fill_(float("nan"))
    assert packing_obstacle(model) == "its weights are not finite numbers"


# --- the setting --------------------------------------------------------------------------------------------------


@needs_float32
@pytest.mark.parametrize(("setting", "is_packed"), [("auto", True), ("on", True), ("off", False)])
def test_the_setting_decides_about_a_checkpoint(
    setting: str, is_packed: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepack_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(prepack_module, "_gain", lambda plain, packed, num_rows: 1.4)
    settings = LoadSettings(device="cpu", prepack=setting)  # type: ignore[arg-type]
    model = load(str(checkpoint("llama")), None, settings).runner.forward.model  # type: ignore[attr-defined]
    assert (num_packed(model) > 0) == is_packed


@needs_float32
@pytest.mark.parametrize(("setting", "is_packed"), [("auto", False), ("on", True), ("off", False)])
def test_a_loaded_model_is_packed_only_with_on(
    setting: str,
    is_packed: bool,
    checkpoint: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepack_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(prepack_module, "_gain", lambda plain, packed, num_rows: 1.4)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    load(model, tokenizer, LoadSettings(prepack=setting))  # type: ignore[arg-type]
    assert (num_packed(model) > 0) == is_packed


def test_on_is_refused_if_packing_is_impossible_and_auto_logs_the_reason(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="chatstream")
    path = str(checkpoint("llama"))
    reason = "it has no linear layers in bfloat16 or float32 on the CPU"
    with pytest.raises(ConfigError, match=f"the weights cannot be prepacked: {reason}"):
        load(path, None, LoadSettings(device="cpu", dtype="float16", prepack="on"))
    load(path, None, LoadSettings(device="cpu", dtype="float16"))
    assert f"the weights are not prepacked: {reason}" in caplog.text
