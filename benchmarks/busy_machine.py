"""The effect of other work on the same cores, by the way in which the threads of the model wait for each other.

    python benchmarks/busy_machine.py --work work

Our engine in its own process with 8 concurrent streams, alone and next to processes that compute all the time. The rows
alternate; each figure is the median over the rounds. Prints Markdown: total tokens/s, and the gap between two tokens of
one stream.

    as served       waiting threads spin briefly, then sleep: engines/process/environment.py
    libgomp's own   300,000 spins, the default of torch
    no spinning     OMP_WAIT_POLICY=PASSIVE
    one thread      no other thread to wait for
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engines_checkpoints import CONTEXT_LEN, SHAPES, make_checkpoint, make_prompts
from engines_measures import Figures, figures, median_of
from engines_worker import Worker

SETTINGS = {
    "as served": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "no spinning": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    options = _parser().parse_args()
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)  # each row sets its own
    with ExitStack() as stack:
        folder = Path(options.work or stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = make_checkpoint(options.model, "bfloat16", folder)
        part = {"checkpoint": str(checkpoint.path), "context_len": CONTEXT_LEN, "in_process": True}
        workers = {}
        for name, environment in SETTINGS.items():
            log = folder / f"busy machine, {name}.log"
            worker = Worker("engines_peers:our_engine", log, part, python=sys.executable, environment=environment)
            workers[name] = stack.enter_context(worker)
            worker.wait_open()
        found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
        for round_ in range(-1, options.rounds):
            for num_busy in [0] if round_ < 0 else options.busy:
                with busy(num_busy):
                    for name, worker in workers.items():
                        prompts = make_prompts(options.streams, seed=round_, vocab_size=checkpoint.vocab_size)
                        answer = worker.ask(prompts=prompts, answer_tokens=options.answer_tokens)
                        if round_ >= 0:  # the first round is a warm-up
                            found[name, num_busy].append(figures(answer["times"]))
    print(f"{checkpoint.name}, {options.streams} streams, {options.rounds} rounds:\n")
    print("| threads | busy processes | tokens/s | gap p50, ms | p99 |\n| --- | --: | --: | --: | --: |")
    for (name, num_busy), rounds in sorted(found.items(), key=lambda item: item[0][1]):
        columns = (("decode_tokens_per_s", 1), ("itl_p50_s", 1e3), ("itl_p99_s", 1e3))
        shown = (_shown(median_of(rounds, figure), times) for figure, times in columns)
        print(f"| {name} | {num_busy} | {' | '.join(shown)} |")


def _shown(value: float | None, times: float) -> str:
    """Format a value; None means that the streams never generated at the same time."""
    return "–" if value is None else f"{value * times:.1f}"


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Run processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of busy processes to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="directory that keeps the checkpoint")
    return parser


if __name__ == "__main__":
    main()
