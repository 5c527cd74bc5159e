"""Our engine through HTTP: `chatstream serve` in one process, its clients in another, on the same machine.

Each prompt is a separate chat, read as server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from engines_peers import Clock, Prompts, Timed
from tokenizers import Tokenizer

HEALTH_PERIOD_S = 0.1
"""Interval of the probes. A probe costs as much as about ten tokens; fifty per second took 7 % of a core."""


@contextmanager
def served(checkpoint: str, context_len: int, max_streams: int, engine_in: str) -> Iterator[Callable[..., Timed]]:
    """With `probe`, /health/live is requested during the run; `health_s` are the response times in seconds."""
    tokenizer = Tokenizer.from_file(str(Path(checkpoint) / "tokenizer.json"))

    async def generate(url: str, prompts: Prompts, answer_tokens: int, probe: bool) -> Timed:
        bodies = [_body(Path(checkpoint).name, tokenizer.decode(prompt), answer_tokens) for prompt in prompts]
        async with httpx2.AsyncClient(base_url=url, timeout=300.0, verify=False, trust_env=False) as client:
            # Open all connections before the clock starts.
            await asyncio.gather(*(client.get("/health/live") for _ in prompts))
            health_s: list[float] = []
            probing = asyncio.create_task(_probe(client, health_s)) if probe else None
            clock = Clock(len(prompts))
            await asyncio.gather(*(_read(client, clock, n, body) for n, body in enumerate(bodies)))
            if probing is not None:
                probing.cancel()
        return clock.timed() | {"health_s": health_s}

    options = ["--context-len", str(context_len), "--max-concurrency", str(max_streams), "--port", "0"]
    options += ["--engine-in", engine_in]
    command = [sys.executable, "-m", "chatstream", "serve", checkpoint, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, asyncio.Runner() as runner:
        try:
            assert server.stdout is not None
            url = next(line.split()[2].rstrip("/") for line in server.stdout if "chat page" in line)
            yield lambda prompts, answer_tokens, probe=False: runner.run(generate(url, prompts, answer_tokens, probe))
        finally:
            server.terminate()


def _body(model: str, text: str, answer_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _read(client: httpx2.AsyncClient, clock: Clock, n: int, body: dict[str, object]) -> None:
    num_tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if '"content":"' in line and '"content":""' not in line:
                clock.note(n)
                num_tokens += 1
            elif '"usage":{' in line:
                usage = json.loads(line.removeprefix("data: "))["usage"]
                if num_tokens != usage["completion_tokens"] or num_tokens != body["max_tokens"]:
                    raise RuntimeError(f"{num_tokens} pieces of text for {usage}")


async def _probe(client: httpx2.AsyncClient, health_s: list[float]) -> None:
    while True:
        sent_s = time.perf_counter()
        (await client.get("/health/live")).raise_for_status()
        health_s.append(time.perf_counter() - sent_s)
        await asyncio.sleep(HEALTH_PERIOD_S)
