"""Steps that are captured and replayed: when, in which shapes, and what happens where it goes wrong.

On a CPU `RecordedPass` does what a CUDA graph does. That whole schedules give the same tokens is test_any_schedule.py.
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


class Beside:
    """The same steps with graphs and without: they must agree."""

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

    def feed(self, **counts: int) -> torch.Tensor:
        """`s3=1`: slot 3 gets one more token. In the order given."""
        inputs = []
        for name, count in counts.items():
            slot = int(name[1:])
            start = self.lengths.get(slot, 0)
            token_ids = tuple((7 * slot + 5 * position) % 64 for position in range(start, start + count))
            inputs.append(SlotInput(slot, start, token_ids, is_last=True))
            self.lengths[slot] = start + count
        logits = self.forward.feed(inputs)
        torch.testing.assert_close(logits, self.plain.feed(inputs), rtol=1e-4, atol=1e-4, equal_nan=True)
        return logits

    def memories(self, forward: SlotForward) -> list[torch.Tensor]:
        return [memory.tensor for layer in forward.cache.layers for memory in layer.memories]


def test_they_are_for_gpus_and_off_unless_they_are_asked_for() -> None:
    assert LoadSettings().cuda_graphs == "off"
    assert capture_on(torch.device("cuda", 0), "auto") is CudaGraph
    assert capture_on(torch.device("cuda", 0), "off") is None
    assert capture_on(torch.device("cpu"), "auto") is None


def test_a_model_is_loaded_with_them(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(device: torch.device, wanted: str) -> Capture:
        asked.append((device.type, wanted))
        return RecordedPass

    monkeypatch.setattr(loader, "capture_on", recorded)
    loaded: Any = loader.load(str(checkpoint("llama")), None, LoadSettings(device="cpu", cuda_graphs="auto"))
    assert asked == [("cpu", "auto")]
    assert loaded.runner.forward.graphs is not None
    assert loaded.speed_key.endswith("CUDA graphs"), "what was measured without them says nothing"


def test_a_shape_that_comes_again_is_captured_then_tried_then_replayed(model: PreTrainedModel) -> None:
    beside = Beside(model, RecordedPass)
    beside.feed(s0=4, s1=9)
    for step in range(1, CAPTURED_AT_STEP + 12):
        beside.feed(s1=1, s0=1)
        assert beside.captures == (step >= CAPTURED_AT_STEP)
        assert beside.graphs.num_replays == max(0, step - CAPTURED_AT_STEP - 1)
    logits = beside.feed(s1=1, s0=1)
    kept = logits.clone()
    beside.feed(s1=1, s0=1)
    assert torch.equal(logits, kept), "the next step does not write there"
    before = beside.graphs.num_replays
    beside.feed(s0=1, s1=3)
    assert beside.graphs.num_replays == before, "part of a prompt is in it"
    beside.feed(s0=1)
    assert beside.graphs.num_replays == before, "one slot is another shape than two"


def test_whoever_is_not_in_the_step_is_left_as_it_was(model: PreTrainedModel) -> None:
    """A reader that lags, half a prompt, a slot that is empty, one in which a generation has failed."""
    beside = Beside(model, RecordedPass)
    beside.feed(s0=4, s1=9, s2=1, s3=6, s4=3, s5=5, s6=2)
    for forward in (beside.forward, beside.plain):
        forward.clear(3, 6)
        for memory in beside.memories(forward):
            memory[4, :, :3] = torch.nan
    # Five slots were never more than seven of eight: the shape ends where memory does.
    for _ in range(CAPTURED_AT_STEP + 20):
        logits = beside.feed(s6=1, s0=1, s2=1)
        assert logits.isfinite().all()
    assert beside.graphs.num_replays == 19
    assert not beside.graphs.has_failed
    for memory, expected in zip(beside.memories(beside.forward), beside.memories(beside.plain), strict=True):
        assert memory.shape == expected.shape, "no memory is taken for slots and positions that nobody has"
        torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        for slot in (1, 3, 4, 5):
            assert torch.equal(memory[slot].nan_to_num(7.0), expected[slot].nan_to_num(7.0))
        assert not memory[3].any()
    beside.lengths[3] = 0
    beside.feed(s3=5, s1=1)
    beside.feed(s3=1, s1=1, s0=1)


def test_shapes_end_where_memory_does(model: PreTrainedModel) -> None:
    beside = Beside(model, RecordedPass)
    beside.feed(s0=4, s1=4, s2=4, s5=600)
    capacity = beside.memories(beside.forward)[0].shape[2]
    shapes = {}
    for slot, start in [(0, 4), (0, 255), (0, 256), (0, 512), (1, 511), (2, 3), (5, 600)]:
        shapes[slot, start] = beside.graphs.shape_of([SlotInput(slot, start, (1,), is_last=True)])
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
    moves = [memory.num_moves for layer in beside.forward.cache.layers for memory in layer.memories]
    assert moves == [1, 1] * NUM_LAYERS


def test_memory_that_has_moved_is_captured_anew(model: PreTrainedModel) -> None:
    beside = Beside(model, RecordedPass)
    beside.feed(s0=200)
    for _ in range(40):
        beside.feed(s0=1)
    assert (beside.captures, beside.graphs.num_replays) == (1, 40 - CAPTURED_AT_STEP - 1)
    for _ in range(30):  # past 256
        beside.feed(s0=1)
    assert beside.captures == 2
    beside.feed(s1=5)  # another slot
    for _ in range(CAPTURED_AT_STEP + 5):
        beside.feed(s0=1)
    assert beside.captures == 3
    assert not beside.graphs.has_failed


def test_no_more_graphs_than_there_is_room_for(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MAX_GRAPHS", 2)
    beside = Beside(model, RecordedPass)
    beside.feed(s0=1, s1=1, s2=1, s3=1, s4=1)
    for shape in ({"s0": 1}, {"s1": 1}, {"s2": 1}, {"s4": 1}):
        for _ in range(CAPTURED_AT_STEP + 3):
            beside.feed(**shape)
    assert beside.captures == 2
    assert beside.graphs.num_replays == 2 * 2
    assert not beside.graphs.has_failed


# --- what may go wrong ----------------------------------------------------------------------------------------------


class Failing(RecordedPass):
    def __init__(self, *args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")


class Different(RecordedPass):
    def replay(self) -> None:
        super().replay()
        self.output[0] *= 1.1


class Frozen(RecordedPass):
    """Computed while it should have been recorded: right once, and never again."""

    def __init__(self, compute: Any, device: torch.device, beside: Any) -> None:
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
    ("capture", "num_replays", "why"),
    [
        (Failing, 0, "stream is capturing"),
        (Different, 0, "other logits"),
        (Frozen, 0, "other logits"),
        (FailingLater, 4, "CUDA error"),
    ],
)
def test_whatever_goes_wrong_steps_run_as_they_are_from_then_on(
    capture: Capture, num_replays: int, why: str, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    beside = Beside(model, capture)
    beside.feed(s0=4, s1=9)
    for _ in range(3 * CAPTURED_AT_STEP):
        beside.feed(s0=1, s1=1)
    for _ in range(3 * CAPTURED_AT_STEP):
        beside.feed(s0=1)
    assert beside.captures == 1
    assert beside.graphs.num_replays == num_replays
    assert beside.graphs.has_failed
    (said,) = caplog.records
    assert "from now on all run without" in said.message
    assert said.exc_info is not None
    assert why in str(said.exc_info[1])


def test_a_step_that_fails_as_it_is_says_nothing_about_graphs(model: PreTrainedModel) -> None:
    beside = Beside(model, RecordedPass)
    beside.feed(s0=4)
    for _ in range(2 * CAPTURED_AT_STEP):
        with pytest.raises(IndexError):
            beside.forward.feed([SlotInput(0, 4, (64,), is_last=True)])
    assert not beside.graphs.has_failed
    for _ in range(2 * CAPTURED_AT_STEP):
        beside.feed(s0=1)
    assert beside.graphs.num_replays > 0


def test_somebody_whose_logits_are_not_finite_does_not_end_it_for_all(model: PreTrainedModel) -> None:
    beside = Beside(model, RecordedPass)
    beside.feed(s0=4, s1=4)
    for forward in (beside.forward, beside.plain):
        for memory in beside.memories(forward):
            memory[1, :, :4] = torch.nan
    for _ in range(2 * CAPTURED_AT_STEP):
        logits = beside.feed(s0=1, s1=1)
        assert logits[0].isfinite().all()
        assert logits[1].isnan().all()
    assert beside.graphs.num_replays > 0


# --- shapes, on no device at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", checkpoints.BATCHED)
def test_nothing_is_asked_of_the_device_or_brought_there_while_a_pass_is_recorded(kind: str) -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            checkpoints.CONFIGS[kind](384), dtype=torch.bfloat16
        ).eval()
    forward = SlotForward(model, checkpoints.CONTEXT_LEN)
    forward.feed([SlotInput(slot, 0, (1,) * 20, is_last=True) for slot in range(5)])
    inputs = [SlotInput(slot, 20, (1,), is_last=True) for slot in (4, 0, 3)]
    shape = (5, checkpoints.CONTEXT_LEN)
    static = StaticPass(forward.cache, forward.logits, shape, inputs, RecordedPass)
    assert static.graph.output.shape == (5, 384)
    assert static.replay(inputs).shape == (3, 384)
    assert static.replay(inputs).device.type == "meta"
    with pytest.raises(RuntimeError, match="cannot be captured"):
        RecordedPass(lambda: forward.feed(inputs), model.device)
