"""Captured steps: when they are captured and replayed, in which shapes, and their failures.

On a CPU `RecordedPass` stands in for a CUDA graph. test_any_schedule.py compares the tokens of whole schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.transformers import decode_graphs, loader
from chatstream.engines.transformers.decode_graphs import CAPTURED_AT_STEP, Capture, CudaGraph, StaticPass, capture_on
from chatstream.engines.transformers.forward import SlotForward
from tests.engines.transformers import checkpoints
from tests.engines.transformers.replay import RecordedPass

MAX_LEN = 1500
NUM_LAYERS = 2


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.4}
    heads: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=MAX_LEN)).eval()


class Pair:
    """Two models with the same steps, one with graphs and one without. Their logits must agree."""

    def __init__(self, model: PreTrainedModel, capture: Capture) -> None:
        self.captures = 0

        def counted(*args: Any) -> Any:
            self.captures += 1
            return capture(*args)

        self.forward = SlotForward(model, MAX_LEN, counted)
        self.plain = SlotForward(model, MAX_LEN)
        self.lengths: dict[int, int] = {}
        assert self.forward.graphs is not None
        self.graphs = self.forward.graphs

    def step(self, **counts: int) -> torch.Tensor:
        """Compute further tokens, `s3=1` for one token in slot 3, in the order given. Returns their logits."""
        inputs = []
        for name, count in counts.items():
            slot = int(name[1:])
            start = self.lengths.get(slot, 0)
            token_ids = tuple((7 * slot + 5 * position) % 64 for position in range(start, start + count))
            inputs.append(SlotInput(slot, start, token_ids, is_last=True))
            self.lengths[slot] = start + count
        logits = self.forward.logits_after(inputs)
        torch.testing.assert_close(logits, self.plain.logits_after(inputs), rtol=1e-4, atol=1e-4, equal_nan=True)
        return logits

    def memories(self, forward: SlotForward) -> list[torch.Tensor]:
        return [memory.tensor for layer in forward.cache.layers for memory in layer.memories]


def test_graphs_are_for_gpus_and_off_by_default() -> None:
    assert LoadSettings().cuda_graphs == "off"
    assert capture_on(torch.device("cuda", 0), "auto") is CudaGraph
    assert capture_on(torch.device("cuda", 0), "off") is None
    assert capture_on(torch.device("cpu"), "auto") is None


def test_a_model_is_loaded_with_graphs(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(device: torch.device, wanted: str) -> Capture:
        asked.append((device.type, wanted))
        return RecordedPass

    monkeypatch.setattr(loader, "capture_on", recorded)
    loaded: Any = loader.load(str(checkpoint("llama")), None, LoadSettings(device="cpu", cuda_graphs="auto"))
    assert asked == [("cpu", "auto")]
    assert loaded.runner.forward.graphs is not None
    assert loaded.speed_key.endswith("CUDA graphs"), "a speed measured without graphs would be reused"


def test_a_repeated_shape_is_captured_then_verified_then_replayed(model: PreTrainedModel) -> None:
    pair = Pair(model, RecordedPass)
    pair.step(s0=4, s1=9)
    for step in range(1, CAPTURED_AT_STEP + 12):
        pair.step(s1=1, s0=1)
        assert pair.captures == (step >= CAPTURED_AT_STEP)
        assert pair.graphs.num_replays == max(0, step - CAPTURED_AT_STEP - 1)
    logits = pair.step(s1=1, s0=1)
    kept = logits.clone()
    pair.step(s1=1, s0=1)
    assert torch.equal(logits, kept), "the next step has overwritten the logits"
    before = pair.graphs.num_replays
    pair.step(s0=1, s1=3)
    assert pair.graphs.num_replays == before, "a step with prompt tokens was replayed"
    pair.step(s0=1)
    assert pair.graphs.num_replays == before, "a new shape was replayed"


def test_slots_outside_the_step_are_unchanged(model: PreTrainedModel) -> None:
    """Slots of a slow reader, of an incomplete prompt, of a failed generation, and an empty slot."""
    pair = Pair(model, RecordedPass)
    pair.step(s0=4, s1=9, s2=1, s3=6, s4=3, s5=5, s6=2)
    for forward in (pair.forward, pair.plain):
        forward.clear(3, 6)
        for memory in pair.memories(forward):
            memory[4, :, :3] = torch.nan
    # Seven slots, not eight: the shape ends where memory does.
    for _ in range(CAPTURED_AT_STEP + 20):
        logits = pair.step(s6=1, s0=1, s2=1)
        assert logits.isfinite().all()
    assert pair.graphs.num_replays == 19
    assert not pair.graphs.has_failed
    for memory, expected in zip(pair.memories(pair.forward), pair.memories(pair.plain), strict=True):
        assert memory.shape == expected.shape, "graphs have allocated slots or positions"
        torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        for slot in (1, 3, 4, 5):
            assert torch.equal(memory[slot].nan_to_num(7.0), expected[slot].nan_to_num(7.0))
        assert not memory[3].any()
    pair.lengths[3] = 0
    pair.step(s3=5, s1=1)
    pair.step(s3=1, s1=1, s0=1)


def test_captured_shapes_do_not_exceed_the_memory(model: PreTrainedModel) -> None:
    pair = Pair(model, RecordedPass)
    pair.step(s0=4, s1=4, s2=4, s5=600)
    capacity = pair.memories(pair.forward)[0].shape[2]
    shapes = {}
    for slot, start in [(0, 4), (0, 255), (0, 256), (0, 512), (1, 511), (2, 3), (5, 600)]:
        shapes[slot, start] = pair.graphs.shape_of([SlotInput(slot, start, (1,), is_last=True)])
    assert shapes == {
        (0, 4): (1, 256),
        (0, 255): (1, 256),
        (0, 256): (1, 512),
        (0, 512): (1, 768),
        (1, 511): (2, 512),
        (2, 3): (4, 256),
        (5, 600): (6, 768),
    }
    assert capacity == 768
    moves = [memory.num_moves for layer in pair.forward.cache.layers for memory in layer.memories]
    assert moves == [1, 1] * NUM_LAYERS


def test_graphs_are_captured_again_after_memory_has_moved(model: PreTrainedModel) -> None:
    pair = Pair(model, RecordedPass)
    pair.step(s0=200)
    for _ in range(40):
        pair.step(s0=1)
    assert (pair.captures, pair.graphs.num_replays) == (1, 40 - CAPTURED_AT_STEP - 1)
    for _ in range(30):  # past 256
        pair.step(s0=1)
    assert pair.captures == 2
    pair.step(s1=5)  # another slot
    for _ in range(CAPTURED_AT_STEP + 5):
        pair.step(s0=1)
    assert pair.captures == 3
    assert not pair.graphs.has_failed


def test_the_number_of_graphs_is_limited(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MAX_GRAPHS", 2)
    pair = Pair(model, RecordedPass)
    pair.step(s0=1, s1=1, s2=1, s3=1, s4=1)
    for shape in ({"s0": 1}, {"s1": 1}, {"s2": 1}, {"s4": 1}):
        for _ in range(CAPTURED_AT_STEP + 3):
            pair.step(**shape)
    assert pair.captures == 2
    assert pair.graphs.num_replays == 2 * 2
    assert not pair.graphs.has_failed


# --- failures -------------------------------------------------------------------------------------------------------


class Failing(RecordedPass):
    def __init__(self, *args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")


class Different(RecordedPass):
    def replay(self) -> None:
        super().replay()
        self.output[0] *= 1.1


class Frozen(RecordedPass):
    """Computes during the capture and replays nothing, so only the first result is right."""

    def __init__(self, compute: Any, device: torch.device, share_with: Any) -> None:
        self.output = compute()

    def replay(self) -> None:
        pass


class FailingLater(RecordedPass):
    replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 5:
            raise RuntimeError("CUDA error")
        super().replay()


@pytest.mark.parametrize(
    ("capture", "num_replays", "reason"),
    [
        (Failing, 0, "stream is capturing"),
        (Different, 0, "other logits"),
        (Frozen, 0, "other logits"),
        (FailingLater, 4, "CUDA error"),
    ],
)
def test_after_a_failure_all_steps_run_without_graphs(
    capture: Capture, num_replays: int, reason: str, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(model, capture)
    pair.step(s0=4, s1=9)
    for _ in range(3 * CAPTURED_AT_STEP):
        pair.step(s0=1, s1=1)
    for _ in range(3 * CAPTURED_AT_STEP):
        pair.step(s0=1)
    assert pair.captures == 1
    assert pair.graphs.num_replays == num_replays
    assert pair.graphs.has_failed
    (record,) = caplog.records
    assert "all further steps run without graphs" in record.message
    assert record.exc_info is not None
    assert reason in str(record.exc_info[1])


def test_a_step_that_fails_without_a_graph_does_not_disable_graphs(model: PreTrainedModel) -> None:
    pair = Pair(model, RecordedPass)
    pair.step(s0=4)
    for _ in range(2 * CAPTURED_AT_STEP):
        with pytest.raises(IndexError):
            pair.forward.logits_after([SlotInput(0, 4, (64,), is_last=True)])
    assert not pair.graphs.has_failed
    for _ in range(2 * CAPTURED_AT_STEP):
        pair.step(s0=1)
    assert pair.graphs.num_replays > 0


def test_logits_of_one_request_that_are_not_finite_do_not_disable_graphs(model: PreTrainedModel) -> None:
    pair = Pair(model, RecordedPass)
    pair.step(s0=4, s1=4)
    for forward in (pair.forward, pair.plain):
        for memory in pair.memories(forward):
            memory[1, :, :4] = torch.nan
    for _ in range(2 * CAPTURED_AT_STEP):
        logits = pair.step(s0=1, s1=1)
        assert logits[0].isfinite().all()
        assert logits[1].isnan().all()
    assert pair.graphs.num_replays > 0


# --- shapes, on the meta device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", checkpoints.BATCHED)
def test_a_recorded_pass_copies_nothing_to_or_from_the_device(kind: str) -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            checkpoints.CONFIGS[kind](384), dtype=torch.bfloat16
        ).eval()
    forward = SlotForward(model, checkpoints.CONTEXT_LEN)
    forward.logits_after([SlotInput(slot, 0, (1,) * 20, is_last=True) for slot in range(5)])
    inputs = [SlotInput(slot, 20, (1,), is_last=True) for slot in (4, 0, 3)]
    shape = (5, checkpoints.CONTEXT_LEN)
    static = StaticPass(forward.cache, forward.forward_pass, shape, inputs, RecordedPass)
    assert static.graph.output.shape == (5, 384)
    assert static.replay(inputs).shape == (3, 384)
    assert static.replay(inputs).device.type == "meta"
    with pytest.raises(RuntimeError, match="cannot be captured"):
        RecordedPass(lambda: forward.logits_after(inputs), model.device)
