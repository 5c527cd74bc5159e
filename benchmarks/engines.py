"""Compares ways to generate for several clients at once, ours and others', on this machine.

    python benchmarks/engines.py --work work --output engines
    python benchmarks/engines.py --models 25m --streams 8 --peers rr generate thread --quick
    python benchmarks/engines.py --parts arrival chat --arrivals-model 25m --quick
    python benchmarks/engines.py --parts peers --peers openvino-steps openvino --weight-format own int8 int4

Needs the extras `transformers`, and for the charts `report`. Three parts:

    peers      1, 8 and 32 simultaneous requests; each gets a greedy answer of fixed length
    arrival    a prompt of 1,024 tokens arrives while 8 sequences generate: their largest gap, its time to first token
    chat       the time to first token of each turn of a conversation; 8 at once with one system prompt of 500 tokens

Checkpoints with random weights are made first (engines_checkpoints.py), and kept with --work. Each peer is loaded once,
in its own process. Peers alternate, and the order is reversed in every second round. Figures are medians over the
rounds; ratios are medians of the ratios within a round. Peers that are not installed are skipped and named:

    OpenVINO   the extra `openvino`, and --optimum-cli for the export (docs/openvino.md)
    llama.cpp  --llama-python, a Python with llama-cpp-python and gguf; not needed if this Python has both

The output is the Markdown of docs/benchmarks.md, with the duration of the run: about 25 minutes for everything on 2
cores, because the peers of --once have one round only.

Reading order: engines_peers (the peers), engines_measures (figures and goals), engines_arrivals; then engines_worker,
engines_http, engines_llama_cpp and engines_report.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from engines_checkpoints import (
    CONTEXT_LEN,
    PROMPT_TOKENS,
    SHAPES,
    Checkpoint,
    exported_to_openvino,
    make_checkpoint,
    make_prompts,
)
from engines_measures import figures
from engines_report import PeerRound, Results, write_report
from engines_worker import Worker

from chatstream.engines.loading.cpu_threads import choose_num_threads
from chatstream.engines.process.environment import for_computing

STREAMS = (1, 8, 32)
HTTP_STREAMS = 16
NUM_TURNS = 8
PARTS = ("peers", "arrival", "chat")
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
    "http-thread": "ours, HTTP, thread",
}
"""Labels in the report, by name on the command line."""
ONCE = ("generate", "cb", "http-thread")
"""Slow peers without a goal, measured in one round."""
ROUND_ROBIN_TOKENS = 128
"""Total answer tokens of round-robin: one of its rounds takes as long as a step of every stream."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to generate, and how its worker is opened."""

    name: str
    part: str
    options: Mapping[str, Any]
    streams: tuple[int, ...]
    variant: str = ""
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return PEERS.get(self.name, self.name) + self.variant

    def answer_tokens(self, num_streams: int, wanted: int) -> int:
        if self.name == "rr":
            return max(4, min(wanted, ROUND_ROBIN_TOKENS // num_streams))
        # Twice the length with many streams: some peers start to generate while they read the last prompts, and there
        # must be an interval in which all generate. For every peer, because a longer context is slower.
        return 2 * wanted if num_streams > 8 else wanted


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    theirs = torch.get_num_threads()
    results = Results(
        command=" ".join(["python", "benchmarks/engines.py", *(arguments or sys.argv[1:])]),
        threads=f"{theirs} threads each, OpenVINO and ours {min(theirs, choose_num_threads(None))}",
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if "peers" in options.parts:
            for size in options.models:
                measure_peers(make_checkpoint(size, options.dtype, work), options, work, results)
        if {"arrival", "chat"} & set(options.parts):
            measure_arrivals(make_checkpoint(options.arrivals_model, options.dtype, work), options, work, results)
    print(write_report(results, options.output))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.5b"])
    parser.add_argument("--arrivals-model", choices=SHAPES, default="0.12b", help="model of the parts arrival and chat")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--once", nargs="*", choices=PEERS, default=ONCE, help="peers to measure in one round only")
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weight-format", nargs="+", choices=("own", "int8", "int4"), default=["own"])
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="fewer than 3 are not meaningful")
    parser.add_argument("--quick", action="store_true", help="one round of short answers, as a smoke test")
    parser.add_argument("--work", type=Path, help="directory that keeps the checkpoints")
    parser.add_argument("--output", type=Path, help="directory for engines.json, engines.md and charts")
    parser.add_argument("--optimum-cli", help="exports to OpenVINO; not needed for existing exports in --work")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python and gguf")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.answer_tokens = 1, min(options.answer_tokens, 24)
    return options


def measure_peers(checkpoint: Checkpoint, options: argparse.Namespace, work: Path, results: Results) -> None:
    found = results.add_model(checkpoint)
    with ExitStack() as stack:
        size = {"dtype": checkpoint.dtype, "hidden_size": checkpoint.hidden_size}
        limit = open_worker(stack, work, Peer("machine", "engines_limit:machine", size, ()))
        workers: list[tuple[Peer, Worker]] = []
        for peer in choose_peers(checkpoint, options, found.left_out):
            log(f"{checkpoint.name}: loading {peer.label}")
            try:
                worker = open_worker(stack, work, peer)  # one after the other: our engine runs trials while it loads
                ask(worker, peer, checkpoint, 2, 4, seed=-1)
            except RuntimeError as error:
                found.left_out[peer.label] = last_line(error)
                continue
            workers.append((peer, worker))
        for number in range(options.rounds):
            found.limits.append(limit.ask())
            for num_streams in sorted({n for peer, _ in workers for n in peer.streams}):
                for peer, worker in workers if number % 2 == 0 else reversed(workers):
                    is_left_out = peer.label in found.left_out or (number > 0 and peer.name in options.once)
                    if num_streams not in peer.streams or is_left_out:
                        continue
                    tokens = peer.answer_tokens(num_streams, options.answer_tokens)
                    try:
                        timed = ask(worker, peer, checkpoint, num_streams, tokens, seed=number)
                        if peer.name.startswith("http"):
                            # A separate run: requests to /health take time from the readers of the answers.
                            probed = ask(worker, peer, checkpoint, num_streams, tokens, seed=1000 + number, probe=True)
                            timed["health_s"] = probed["health_s"]
                    except RuntimeError as error:
                        found.left_out[peer.label] = last_line(error)
                        continue
                    measured = figures(timed["times"], timed.get("health_s", ()))
                    found.rounds.append(PeerRound(peer.label, num_streams, tokens, number, measured))
                    steady = measured.decode_tokens_per_s or 0.0
                    log(f"{checkpoint.name} round {number + 1}: {num_streams} × {peer.label}: {steady:.1f} tokens/s")
            write_report(results, options.output)


def choose_peers(checkpoint: Checkpoint, options: argparse.Namespace, left_out: dict[str, str]) -> list[Peer]:
    """Return the selected and installed peers; the others go to `left_out`, with the reason."""
    streams = tuple(options.streams)
    max_streams = max(*streams, HTTP_STREAMS)
    path = str(checkpoint.path)
    theirs = {"checkpoint": path, "dtype": checkpoint.dtype}
    ours = {"checkpoint": path, "context_len": CONTEXT_LEN}
    served = ours | {"max_streams": max_streams}
    as_served = for_computing(os.environ)  # bare steps get the environment of an engine process
    llama_python = options.llama_python or sys.executable
    llama = {"checkpoint": path, "num_threads": torch.get_num_threads(), "max_streams": max_streams}
    llama |= {"stream_tokens": 2 * (PROMPT_TOKENS + options.answer_tokens)}
    peers = [
        Peer("rr", "engines_peers:round_robin", theirs, streams),
        Peer("generate", "engines_peers:padded_generate", theirs, streams),
        Peer("cb", "engines_peers:continuous_batching", theirs | {"num_blocks": 2 * max_streams + 8}, streams),
        Peer("llama", "engines_llama_cpp:llama_cpp", llama, streams, python=llama_python),
        Peer(
            "steps",
            "engines_peers:our_steps",
            ours,
            (*streams, HTTP_STREAMS) if "http" in options.peers else streams,
            environment=as_served,
        ),
        Peer("thread", "engines_peers:our_engine", ours | {"in_process": False}, streams),
        Peer("process", "engines_peers:our_engine", ours | {"in_process": True}, streams),
        Peer("http", "engines_http:served", served | {"engine_in": "process"}, (HTTP_STREAMS,)),
        Peer("http-thread", "engines_http:served", served | {"engine_in": "thread"}, (HTTP_STREAMS,)),
    ]
    if "llama" in options.peers and not (options.llama_python or (find_spec("llama_cpp") and find_spec("gguf"))):
        left_out[PEERS["llama"]] = "llama-cpp-python and gguf are not installed; see --llama-python"
    for weight_format in options.weight_format if {"openvino", "openvino-steps"} & set(options.peers) else ():
        is_own = weight_format == "own"
        end = "" if is_own else f", {weight_format}"
        try:
            exported = exported_to_openvino(checkpoint, None if is_own else weight_format, options.optimum_cli)
        except RuntimeError as error:
            left_out[f"OpenVINO{end}"] = last_line(error)
            continue
        model = {"exported": str(exported), "dtype": checkpoint.dtype if is_own else "auto", "context_len": 512}
        for name, part, environment in (
            ("openvino-steps", "openvino_steps", as_served),
            ("openvino", "openvino_engine", {}),
        ):
            peers.append(Peer(name, f"engines_peers:{part}", model, streams, end, environment=environment))
    return [peer for peer in peers if peer.name in options.peers and peer.label not in left_out]


def ask(
    worker: Worker, peer: Peer, checkpoint: Checkpoint, num_streams: int, tokens: int, *, seed: int, **question: Any
) -> Any:
    prompts = make_prompts(num_streams, seed=seed, vocab_size=checkpoint.vocab_size)
    timed = worker.ask(prompts=prompts, answer_tokens=tokens, **question)
    lengths = {len(stream) for stream in timed["times"]}
    if lengths != {tokens}:
        raise RuntimeError(f"{peer.label} gave answers of {sorted(lengths)} tokens, not {tokens}")
    return timed


def measure_arrivals(checkpoint: Checkpoint, options: argparse.Namespace, work: Path, results: Results) -> None:
    results.arrivals_model = checkpoint.name
    shared = {"dtype": checkpoint.dtype, "vocab_size": checkpoint.vocab_size, "model": str(checkpoint.path)}
    if "arrival" in options.parts:
        variants = {"ours": shared | {"engine_of": "ours"}, "ours, in one step": shared | {"engine_of": "ours_whole"}}
        if "cb" in options.peers:
            variants[PEERS["cb"]] = shared | {"engine_of": "continuous_batching"}
        if "openvino" in options.peers:
            try:
                exported = exported_to_openvino(checkpoint, None, options.optimum_cli)
                variants[PEERS["openvino"]] = shared | {"engine_of": "openvino", "model": str(exported)}
            except RuntimeError as error:
                results.left_out[PEERS["openvino"]] = last_line(error)
        alternate("long_prompt", variants, {}, options.rounds, work, results.arrival, results.left_out)
    if "chat" in options.parts:
        variants = {"cached": shared | {"prefix_cache": True}, "recomputed": shared | {"prefix_cache": False}}
        question = {"num_turns": 3 if options.quick else NUM_TURNS}
        alternate("conversation", variants, question, options.rounds, work, results.chat, results.left_out)


def alternate(
    part: str,
    variants: Mapping[str, Mapping[str, Any]],
    question: Mapping[str, Any],
    num_rounds: int,
    work: Path,
    into: dict[str, list[dict[str, Any]]],
    left_out: dict[str, str],
) -> None:
    """Run the variants of a part of engines_arrivals.py alternately. Each is opened before its first question."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for number in range(num_rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                if variant in left_out:
                    continue
                try:
                    if variant not in workers:
                        peer = Peer(variant, f"engines_arrivals:{part}", variants[variant], ())
                        workers[variant] = open_worker(stack, work, peer)
                    measured = workers[variant].ask(seed=number, **question)
                except RuntimeError as error:
                    left_out[variant] = last_line(error)
                    continue
                into.setdefault(variant, []).append(measured)
                log(f"round {number + 1}: {part}, {variant}: {measured}")


def open_worker(stack: ExitStack, work: Path, peer: Peer) -> Worker:
    log = work / f"{peer.label}.log"
    worker = Worker(peer.part, log, peer.options, python=peer.python, environment=peer.environment)
    stack.enter_context(worker)
    worker.wait_open()
    return worker


def last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
