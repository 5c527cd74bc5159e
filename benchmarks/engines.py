"""Ways to generate for several people at once, ours and others', measured beside each other on this machine.

    python benchmarks/engines.py --output engines
    python benchmarks/engines.py --models 25m --streams 8 --peers rr generate thread --quick
    python benchmarks/engines.py --parts newcomer chat --newcomers-model 25m --quick

Needs the extras `transformers`, and for the charts `report`. Three parts:

    peers      1, 8 and 32 people ask at the same moment; each gets an answer of so many tokens, chosen greedily
    newcomer   a prompt of 1,024 tokens arrives beside 8 who generate: their largest gap, its time to first token
    chat       the time to first token of each turn of a conversation; 8 at once with one system prompt of 500 tokens

Checkpoints with random weights are made first (engines_checkpoints.py), and kept with --work. Each peer is loaded once,
in a process of its own, and they take turns; the order is turned round from round to round. Figures are medians over
the rounds, ratios are medians of the ratios within a round. Peers that are not installed are left out and named:

    OpenVINO   the extra `openvino`, and --optimum-cli for the export (docs/openvino.md)
    llama.cpp  --llama-python, a Python with llama-cpp-python and gguf; one with both is found by itself

A run with everything says at its end how long it took: about 25 minutes on 2 cores.

Read the files in this order: engines_peers (the ways themselves), engines_measures (what is computed from times, and
the goals), engines_newcomers; engines_worker, engines_http, engines_llama_cpp and engines_report are the rest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loky
from engines_checkpoints import (
    CONTEXT_LEN,
    SHAPES,
    Checkpoint,
    export_to_openvino,
    exported_to_openvino,
    make_checkpoint,
    make_prompts,
)
from engines_measures import figures
from engines_report import PeerRound, Results, write_report
from engines_worker import Worker

STREAMS = (1, 8, 32)
HTTP_STREAMS = 16
PROMPT_TOKENS = 64
NUM_TURNS = 8
PARTS = ("peers", "newcomer", "chat")
PEERS = {
    "rr": "round-robin",
    "generate": "HF generate, padded",
    "cb": "HF continuous batching",
    "llama": "llama.cpp",
    "openvino-steps": "OpenVINO, bare steps",
    "openvino": "OpenVINO, engine",
    "steps": "ours, bare steps",
    "thread": "ours, thread",
    "process": "ours, process",
    "http": "ours, HTTP",
}
"""Names on the command line, and in the report."""
ROUND_ROBIN_TOKENS = 128
"""Of all streams together: each of its steps is as long as all streams have steps by themselves."""
LOCKSTEP = ("rr", "generate", "llama", "steps")
"""All prompts first, then everybody's tokens. With the others some generate while the last prompts are read."""


@dataclass(frozen=True, slots=True)
class Peer:
    """How one is opened."""

    name: str
    part: str
    options: dict[str, Any]
    streams: tuple[int, ...]
    python: str = sys.executable

    @property
    def label(self) -> str:
        return PEERS[self.name]

    def answer_tokens(self, num_streams: int, wanted: int) -> int:
        if self.name == "rr":
            return max(4, min(wanted, ROUND_ROBIN_TOKENS // num_streams))
        if self.name not in LOCKSTEP and num_streams > 8:
            return 2 * wanted  # or there would be no time in which all generate
        return wanted


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    results = Results(command=" ".join(["python", "benchmarks/engines.py", *(arguments or sys.argv[1:])]))
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if "peers" in options.parts:
            for size in options.models:
                measure_peers(make_checkpoint(size, options.dtype, work), options, work, results)
        if {"newcomer", "chat"} & set(options.parts):
            measure_newcomers(make_checkpoint(options.newcomers_model, options.dtype, work), options, work, results)
    print(write_report(results, options.output))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.5b"])
    parser.add_argument("--newcomers-model", choices=SHAPES, default="0.12b", help="of the parts newcomer and chat")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; fewer than 3 say little")
    parser.add_argument("--quick", action="store_true", help="one round of short answers: does everything run?")
    parser.add_argument("--work", type=Path, help="a directory for checkpoints, to be found there again")
    parser.add_argument("--output", type=Path, help="a directory for engines.json, engines.md and charts")
    parser.add_argument("--optimum-cli", help="exports to OpenVINO; not needed for what --work holds already")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python and gguf")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.answer_tokens = 1, min(options.answer_tokens, 24)
    return options


def measure_peers(checkpoint: Checkpoint, options: argparse.Namespace, work: Path, results: Results) -> None:
    found = results.add_model(checkpoint)
    with ExitStack() as stack:
        limit = open_worker(
            stack, work, "engines_limit:machine", dtype=checkpoint.dtype, hidden_size=checkpoint.hidden_size
        )
        limit.wait_open()
        workers: list[tuple[Peer, Worker]] = []
        for peer in choose_peers(checkpoint, options, found.left_out):
            say(f"{checkpoint.name}: loading {peer.label}")
            try:
                worker = open_worker(stack, work, peer.part, python=peer.python, **peer.options)
                worker.wait_open()  # one after the other: ours tries out while it loads what is faster
                ask(worker, peer, checkpoint, 2, 4, seed=-1)
            except RuntimeError as error:
                found.left_out[peer.label] = str(error).strip().splitlines()[-1]
                continue
            workers.append((peer, worker))
        for number in range(options.repeats):
            found.limits.append(limit.ask())
            for num_streams in sorted({n for peer, _ in workers for n in peer.streams}):
                for peer, worker in workers if number % 2 == 0 else reversed(workers):
                    if num_streams not in peer.streams or peer.label in found.left_out:
                        continue
                    tokens = peer.answer_tokens(num_streams, options.answer_tokens)
                    try:
                        timed = ask(worker, peer, checkpoint, num_streams, tokens, seed=number)
                    except RuntimeError as error:
                        found.left_out[peer.label] = str(error).strip().splitlines()[-1]
                        continue
                    measured = figures(timed["times"], timed.get("health_s", ()), count_tokens=options.answer_tokens)
                    found.rounds.append(PeerRound(peer.label, num_streams, tokens, number, measured))
                    steady = measured.decode_tokens_per_s or 0.0
                    say(f"{checkpoint.name} round {number + 1}: {num_streams} × {peer.label}: {steady:.1f} tokens/s")
            write_report(results, options.output)


def choose_peers(checkpoint: Checkpoint, options: argparse.Namespace, left_out: dict[str, str]) -> list[Peer]:
    """Those that were asked for and are there; the others go to `left_out`, with the reason."""
    streams = tuple(options.streams)
    most = max(*streams, HTTP_STREAMS)
    with_http = (*streams, HTTP_STREAMS) if "http" in options.peers else streams
    path = str(checkpoint.path)
    theirs = {"checkpoint": path, "dtype": checkpoint.dtype}
    ours = {"checkpoint": path, "context_len": CONTEXT_LEN}
    peers = [
        Peer("rr", "engines_peers:round_robin", theirs, streams),
        Peer("generate", "engines_peers:padded_generate", theirs, streams),
        Peer("cb", "engines_peers:continuous_batching", theirs | {"max_streams": most}, streams),
        Peer("steps", "engines_peers:our_steps", ours, with_http),
        Peer("thread", "engines_peers:our_thread", ours, streams),
        Peer("process", "engines_peers:our_process", ours, streams),
        Peer("http", "engines_http:served", ours | {"max_streams": most}, (HTTP_STREAMS,)),
    ]
    python = options.llama_python or (sys.executable if find_spec("llama_cpp") and find_spec("gguf") else None)
    if python is None:
        left_out[PEERS["llama"]] = "llama-cpp-python and gguf are not installed; see --llama-python"
    else:
        room = {
            "num_threads": loky.cpu_count(only_physical_cores=True),  # as torch chooses
            "max_streams": most,
            "stream_tokens": 2 * PROMPT_TOKENS + options.answer_tokens,
        }
        peers.append(Peer("llama", "engines_llama_cpp:llama_cpp", {"checkpoint": path} | room, streams, python))
    exported = exported_to_openvino(checkpoint)
    if find_spec("openvino_genai") is None:
        left_out["OpenVINO"] = "openvino-genai is not installed"
    elif not exported.exists() and options.optimum_cli is None:
        left_out["OpenVINO"] = "it is not exported; see --optimum-cli"
    else:
        room = {"exported": str(exported), "dtype": checkpoint.dtype, "context_len": 512}
        peers.append(Peer("openvino-steps", "engines_peers:openvino_steps", room, streams))
        peers.append(Peer("openvino", "engines_peers:openvino_engine", room, streams))
    chosen = [peer for peer in peers if peer.name in options.peers]
    if not exported.exists() and any(peer.name.startswith("openvino") for peer in chosen):
        say(f"{checkpoint.name}: exporting to OpenVINO")
        export_to_openvino(checkpoint, options.optimum_cli)
    return chosen


def ask(worker: Worker, peer: Peer, checkpoint: Checkpoint, num_streams: int, tokens: int, *, seed: int) -> Any:
    prompts = make_prompts(num_streams, PROMPT_TOKENS, seed=seed, vocab_size=checkpoint.vocab_size)
    timed = worker.ask(prompts=prompts, answer_tokens=tokens)
    lengths = {len(stream) for stream in timed["times"]}
    if lengths != {tokens}:
        raise RuntimeError(f"{peer.label} gave answers of {sorted(lengths)} tokens, not {tokens}")
    return timed


def measure_newcomers(checkpoint: Checkpoint, options: argparse.Namespace, work: Path, results: Results) -> None:
    results.newcomers_model = checkpoint.name
    model = {"checkpoint": str(checkpoint.path), "context_len": CONTEXT_LEN, "vocab_size": checkpoint.vocab_size}
    parts = {
        "newcomer": ("long_prompt", {"mixed": {"whole": False}, "whole": {"whole": True}}, {}, results.newcomer),
        "chat": (
            "conversation",
            {"kept": {"prefix_cache": True}, "computed again": {"prefix_cache": False}},
            {"num_turns": 3 if options.quick else NUM_TURNS},
            results.chat,
        ),
    }
    for name in options.parts:
        if name not in parts:
            continue
        part, variants, question, into = parts[name]
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for variant, settings in variants.items():
                workers[variant] = open_worker(stack, work, f"engines_newcomers:{part}", **model, **settings)
                workers[variant].wait_open()
            for number in range(options.repeats):
                for variant in workers if number % 2 == 0 else reversed(workers):
                    measured = workers[variant].ask(seed=number, **question)
                    into.setdefault(variant, []).append(measured)
                    say(f"{checkpoint.name} round {number + 1}: {name}, {variant}: {measured}")


def open_worker(stack: ExitStack, work: Path, part: str, python: str = sys.executable, **options: Any) -> Worker:
    log = work / f"{part.partition(':')[2]}.log"
    return stack.enter_context(Worker(part, log, python=python, **options))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
