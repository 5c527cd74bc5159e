"""The engine in a thread of the server and in a process of its own: tokens a second, and how fast /health answers.

    python benchmarks/engine_in_process.py
    python benchmarks/engine_in_process.py --demo --rounds 5

Needs the extra `transformers`, unless --demo. One `chatstream serve` after the other, thread and process in turns, each
with 8 and then 16 clients that read answers as server-sent events while somebody asks for /health/live every 20 ms. The
clients are a process on the same machine. Prints each round, and the medians of process ÷ thread: where others use the
machine too, these say more than the figures themselves, and most of all the processor's time for each token, of the
server and its child together. Linux only, because that is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

NUM_STREAMS = (8, 16)
ANSWERS_EACH = 2
ANSWER_TOKENS = 64
PROBE_PERIOD_S = 0.02
MODES = ("thread", "process")


@dataclass(frozen=True, slots=True)
class Round:
    tokens_per_s: float
    health_p50_ms: float
    health_p99_ms: float
    cpu_ms_per_token: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the bundled model instead of a random one of 25M")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = [] if options.demo else [str(random_checkpoint(Path(folder) / "random-25M")), "--dtype", "bfloat16"]
        rounds: dict[tuple[str, int], list[Round]] = {(mode, n): [] for n in NUM_STREAMS for mode in MODES}
        for number in range(options.rounds):
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                with serving(*model, "--engine-in", mode) as (url, pid):
                    for num_streams in NUM_STREAMS:
                        measured = asyncio.run(measure(url, pid, num_streams))
                        rounds[mode, num_streams].append(measured)
                        print(mode, num_streams, measured, file=sys.stderr)
    show(rounds)


def show(rounds: dict[tuple[str, int], list[Round]]) -> None:
    table = Table(
        "streams", "engine in", "tokens/s", "/health p50, ms", "p99, ms", "CPU ms a token", title="each round"
    )
    for (mode, num_streams), measured in rounds.items():
        columns = zip(*map(astuple, measured), strict=True)
        table.add_row(str(num_streams), mode, *(" / ".join(f"{value:.3g}" for value in column) for column in columns))
    Console().print(table)
    table = Table(
        "streams", "tokens/s", "/health p50", "p99", "CPU a token", title="process ÷ thread, median of the rounds"
    )
    for num_streams in NUM_STREAMS:
        pairs = zip(rounds["process", num_streams], rounds["thread", num_streams], strict=True)
        ratios = [[a / b for a, b in zip(astuple(process), astuple(thread), strict=True)] for process, thread in pairs]
        table.add_row(str(num_streams), *(f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True)))
    Console().print(table)


async def measure(url: str, pid: int, num_streams: int) -> Round:
    async with httpx2.AsyncClient(base_url=url, timeout=300.0, verify=False, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await asyncio.gather(
            *(answer(client, model, 4) for _ in range(num_streams))
        )  # connections, and the first prompts
        delays_ms: list[float] = []
        probing = asyncio.create_task(probe(client, delays_ms))
        begun_s, cpu_before_s = time.monotonic(), cpu_s(pid)
        num_tokens = sum(await asyncio.gather(*(answers(client, model) for _ in range(num_streams))))
        elapsed_s = time.monotonic() - begun_s
        cpu_ms = (cpu_s(pid) - cpu_before_s) * 1000
        probing.cancel()
    centiles = statistics.quantiles(delays_ms, n=100)
    return Round(num_tokens / elapsed_s, centiles[49], centiles[98], cpu_ms / num_tokens)


def cpu_s(pid: int) -> float:
    """That a process and its children have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(cpu_s(int(child)) for child in children)


async def answers(client: httpx2.AsyncClient, model: str) -> int:
    return sum([await answer(client, model, ANSWER_TOKENS) for _ in range(ANSWERS_EACH)])


async def answer(client: httpx2.AsyncClient, model: str, max_tokens: int) -> int:
    """Read one as it comes; its tokens. Not of a conversation: each is like the first."""
    body = {
        "messages": [{"role": "user", "content": "What is a slot, and why do I wait in line?"}],
        "model": model,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    num_tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if '"usage":{' in line:
                num_tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return num_tokens


async def probe(client: httpx2.AsyncClient, delays_ms: list[float]) -> None:
    while True:
        asked_s = time.monotonic()
        (await client.get("/health/live")).raise_for_status()
        delays_ms.append((time.monotonic() - asked_s) * 1000)
        await asyncio.sleep(PROBE_PERIOD_S)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, int]]:
    """Its address and its process id."""
    room = ["--max-concurrency", str(max(NUM_STREAMS)), "--max-queue-size", str(max(NUM_STREAMS)), "--port", "0"]
    command = [sys.executable, "-m", "chatstream", "serve", *arguments, *room]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield next(line.split()[2].rstrip("/") for line in server.stdout if "chat page" in line), server.pid
        finally:
            server.terminate()


def random_checkpoint(folder: Path) -> Path:
    """Qwen3 with 25 million random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab = {token: n for n, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
