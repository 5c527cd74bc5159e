"""How fast an exported model generates: OpenVINO's bare steps, and our engine over them in a thread and in a process.

    python benchmarks/openvino_speed.py DIRECTORY
    python benchmarks/openvino_speed.py DIRECTORY --make --optimum-cli /tmp/export/bin/optimum-cli --weight-format int8

With --make DIRECTORY is written first: random weights in the shape of Qwen2 0.5B, exported by an optimum-cli that is
installed elsewhere (docs/openvino.md). Rounds of everything alternate with a probe of how fast this machine reads its
memory just then: a step reads every weight once, so bytes of weights over bytes a second is the limit of one. Medians
and the whole range are shown, because on a shared machine both move.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from memory_speed import read_speed
from rich.console import Console
from rich.table import Table

from chatstream.engines.base import Engine
from chatstream.engines.openvino import create_engine
from chatstream.engines.openvino.loader import load
from chatstream.engines.openvino.pipeline import Pipeline
from chatstream.engines.openvino.settings import LoadSettings
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams

STREAMS = (1, 8, 32)
PROMPT_TOKENS, ANSWER_TOKENS = 64, 16
ROUNDS = 3


@dataclass
class Figures:
    """Of one number of streams, one value a round."""

    bare_step_s: list[float] = field(default_factory=list)
    """The median of a round's steps in which everybody decodes."""
    thread_tokens_per_s: list[float] = field(default_factory=list)
    """Through the engine, prompts included."""
    process_tokens_per_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--optimum-cli", default="optimum-cli")
    parser.add_argument("--weight-format", default="fp16")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if options.make:
        make(options.directory, options.optimum_cli, options.weight_format)
    read_bytes_per_s, figures = asyncio.run(measure(options.directory, rounds=options.rounds))
    show(weight_bytes(options.directory), read_bytes_per_s, figures)


async def measure(
    directory: Path, streams: tuple[int, ...] = STREAMS, *, rounds: int = ROUNDS
) -> tuple[list[float], dict[int, Figures]]:
    """Bytes a second that this machine read in each round, and what it generated, by number of streams."""
    settings = LoadSettings(context_len=512)
    pipeline = load(directory, settings).pipeline
    read_bytes_per_s: list[float] = []
    figures = {num_streams: Figures() for num_streams in streams}
    make_engine = partial(create_engine, str(directory), context_len=512)
    from chatstream.engines.process import ProcessEngine

    async with started(make_engine()) as in_thread, started(ProcessEngine(make_engine)) as in_process:
        for n in range(rounds):
            read_bytes_per_s.append(read_speed())
            for num_streams, found in figures.items():
                found.bare_step_s.append(bare_step_s(pipeline, num_streams, seed=n))
                found.thread_tokens_per_s.append(await tokens_per_s(in_thread, num_streams, seed=n))
                found.process_tokens_per_s.append(await tokens_per_s(in_process, num_streams, seed=n))
    return read_bytes_per_s, figures


def bare_step_s(pipeline: Pipeline, num_streams: int, *, seed: int = 0) -> float:
    """Seconds of a step in which everybody decodes, the median of as many as an answer has."""
    greedy = SamplingParams(temperature=0.0)
    generations = [
        pipeline.add(prompt, greedy, max_new_tokens=400, eos_token_ids=frozenset())
        for prompt in prompts(num_streams, seed)
    ]
    decoding: set[int] = set()
    while len(decoding) < num_streams:
        pipeline.step()
        decoding |= {n for n, generation in enumerate(generations) if generation.take()}
    seconds = []
    for _ in range(ANSWER_TOKENS):
        began = time.perf_counter()
        pipeline.step()
        seconds.append(time.perf_counter() - began)
    for generation in generations:
        generation.cancel()
    pipeline.step()
    return statistics.median(seconds)


async def tokens_per_s(engine: Engine, num_streams: int, *, seed: int = 0) -> float:
    """Of all streams together, from the first request to the last token."""

    async def read(n: int, prompt: list[int]) -> int:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
        request = GenerationRequest(f"r{n}", PreparedPrompt(tuple(prompt)), sampling)
        async with aclosing(engine.stream(request)) as stream:
            return sum([delta.num_tokens async for delta in stream])

    began = time.perf_counter()
    tokens = await asyncio.gather(*(read(n, prompt) for n, prompt in enumerate(prompts(num_streams, 1000 + seed))))
    return sum(tokens) / (time.perf_counter() - began)


def prompts(num_streams: int, seed: int) -> list[list[int]]:
    """Of which none begins as another, in this round and in others: nothing is found in the cache."""
    rng = np.random.default_rng((seed, num_streams))
    return [[int(token) for token in rng.integers(5, 300, PROMPT_TOKENS)] for _ in range(num_streams)]


def weight_bytes(directory: Path) -> int:
    return (directory / "openvino_model.bin").stat().st_size


def make(directory: Path, optimum_cli: str, weight_format: str) -> None:
    """Random weights in the shape of Qwen2 0.5B, exported."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    with tempfile.TemporaryDirectory() as checkpoint:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(checkpoint)
        export(Path(checkpoint), directory, optimum_cli, weight_format)
    # Its text means nothing; any tokenizer does.
    tiny = Path(__file__).parent.parent / "tests" / "engines" / "openvino" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny / name).read_bytes())


def export(checkpoint: Path, directory: Path, optimum_cli: str = "optimum-cli", weight_format: str = "fp16") -> None:
    """As docs/openvino.md says, for a checkpoint without a tokenizer."""
    task = ["--task", "text-generation-with-past", "--weight-format", weight_format, "--disable-convert-tokenizer"]
    subprocess.run([optimum_cli, "export", "openvino", "--model", checkpoint, *task, directory], check=True)


def show(weights: int, read_bytes_per_s: list[float], figures: dict[int, Figures]) -> None:
    console = Console()
    best = max(read_bytes_per_s)
    console.print(
        f"weights: {weights / 2**20:,.0f} MiB; memory read at {span([r / 1e9 for r in read_bytes_per_s])} GB/s; "
        f"limit of a step at the best of these {weights / best * 1e3:.1f} ms"
    )
    table = Table("streams", "bare step, ms", "of the limit", "thread, tokens/s", "process, tokens/s")
    for num_streams, found in figures.items():
        share = weights / best / min(found.bare_step_s)
        table.add_row(
            str(num_streams),
            span([seconds * 1e3 for seconds in found.bare_step_s]),
            f"{share:.0%}",
            span(found.thread_tokens_per_s),
            span(found.process_tokens_per_s),
        )
    console.print(table)


def span(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


if __name__ == "__main__":
    main()
