"""Probes OpenVINO GenAI's continuous batching with invalid and extreme input. Findings: docs/openvino.md.

    python benchmarks/openvino_probe.py

Uses the small export of the tests. Each probe has its own process, because some of them end it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino import opset13

TINY = Path(__file__).parent.parent / "tests" / "engines" / "openvino" / "tiny"
HELLO = [5, 6, 7, 8]
STATUS = openvino_genai.GenerationStatus


def main() -> None:
    if len(sys.argv) > 1:
        print(PROBES[sys.argv[1]]())
        return
    print("openvino-genai", openvino_genai.__version__)
    for name in PROBES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, timeout=300)
        result = (
            done.stdout.strip() if done.returncode == 0 else f"the process ended with {done.returncode}: {done.stderr}"
        )
        print(f"\n{name}\n    " + result[-2000:].replace("\n", "\n    "))


# --- probes -------------------------------------------------------------------------------------------------------


def lock() -> str:
    """Measure whether another Python thread runs during a step."""
    p, counted, is_over = pipeline(max_num_batched_tokens=4096, num_kv_blocks=256), [0], threading.Event()

    def count() -> None:
        while not is_over.is_set():
            counted[0] += 1

    threading.Thread(target=count, daemon=True).start()
    time.sleep(1.0)
    alone_per_s, shares = counted[0], []
    for n in range(5):
        handle = p.add_request(n, tensor([9 + n] * 4000), config(1))
        began, before = time.perf_counter(), counted[0]
        p.step()
        shares.append((counted[0] - before) / (time.perf_counter() - began) / alone_per_s)
        handle.cancel()
    is_over.set()
    return "speed of a counting thread during a step, relative to its speed alone: " + ", ".join(
        f"{s:.0%}" for s in shares
    )


def token_ids_out_of_range() -> str:
    results = []
    for bad in (384, 10**6, -1, 2**31):
        p = pipeline()
        results.append(f"{bad}: {outcomes(p, lambda p=p, bad=bad: p.add_request(2, tensor([5, bad]), config(5)))}")
    p = pipeline()
    penalised = lambda: p.add_request(2, tensor([5, 384]), config(5, repetition_penalty=1.1))  # noqa: E731
    return "\n".join([*results, f"384 with a repetition penalty: {outcomes(p, penalised)}"])


def empty_prompt() -> str:
    p = pipeline()
    return outcomes(p, lambda: p.add_request(2, openvino.Tensor(np.zeros((1, 0), dtype=np.int64)), config(5)))


def prompt_longer_than_the_context() -> str:
    p = pipeline()
    return outcomes(p, lambda: p.add_request(2, tensor([5] * 400), config(5)))


def prompt_larger_than_the_cache() -> str:
    p = pipeline(num_kv_blocks=4)
    return outcomes(p, lambda: p.add_request(2, tensor([5] * 400), config(5)))


def more_requests_than_the_cache_holds() -> str:
    prompts = [[5 + n, *range(5, 65)] for n in range(4)]
    alone = [drain(p := pipeline(), p.add_request(1, tensor(prompt), config(60))) for prompt in prompts]
    p = pipeline(num_kv_blocks=8, enable_prefix_caching=False)
    handles = [p.add_request(n, tensor(prompt), config(60)) for n, prompt in enumerate(prompts)]
    results = [drain(p, handle) for handle in handles]
    return f"exact: {[result == expected for result, expected in zip(results, alone, strict=True)]}"


def same_prefixes() -> str:
    """Run 60 requests with a common prefix, up to four at once, some cancelled, in a cache of 24 blocks."""
    rng = np.random.default_rng(2)
    beginning = [int(t) for t in rng.integers(5, 380, 70)]
    prompts = [beginning[: rng.integers(1, 70)] + [int(t) for t in rng.integers(5, 380, 10)] for _ in range(60)]
    p = pipeline(enable_prefix_caching=False)
    alone = [drain(p, p.add_request(n, tensor(prompt), config(20)))[0] for n, prompt in enumerate(prompts)]
    p, running, answers, num_cancelled = pipeline(num_kv_blocks=24, max_num_batched_tokens=48), {}, {}, 0
    waiting = list(enumerate(prompts))
    while waiting or running:
        while waiting and len(running) < 4 and rng.random() < 0.6:
            number, prompt = waiting.pop(0)
            running[number], answers[number] = p.add_request(number, tensor(prompt), config(20)), []
        p.step()
        for number, handle in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    answers[number] += output.generated_ids
            if handle.get_status() != STATUS.RUNNING:
                del running[number]
            elif rng.random() < 0.01:
                running.pop(number).cancel()
                num_cancelled += 1
    wrong = [number for number, tokens in answers.items() if tokens != alone[number][: len(tokens)]]
    return f"wrong: {wrong}; cancelled: {num_cancelled}"


def cancelled_request_holds_all_blocks() -> str:
    """Add a request in the step in which a cancelled one still holds all blocks."""
    p = pipeline(num_kv_blocks=5, max_num_batched_tokens=64)
    first = p.add_request(1, tensor([5] * 150), config(9))
    for _ in range(3):
        p.step()
    first.cancel()
    return str(drain(p, p.add_request(2, tensor([6] * 150), config(9))))


def same_request_id_twice() -> str:
    p = pipeline()
    p.add_request(1, tensor([9, 8]), config(8)).cancel()
    p.step()
    again = drain(p, p.add_request(1, tensor(HELLO), config(8)))
    return f"after the first has ended: {again}\nwhile it runs: " + outcomes(
        p, lambda: p.add_request(1, tensor([9]), config(8)), others_number=1
    )


def after_an_exception() -> str:
    p, results = pipeline(), []
    handles = [p.add_request(1, tensor(HELLO), config(8)) for _ in range(2)]
    for attempt in range(5):
        if attempt == 3:
            for handle in handles:
                handle.cancel()
        results.append(f"step {attempt}: {error_of(p.step)}")
    return "\n".join([*results, f"after all were cancelled: {drain(p, p.add_request(3, tensor(HELLO), config(4)))}"])


def cancel() -> str:
    p = pipeline(enable_prefix_caching=False)
    handles = [p.add_request(n, tensor([*HELLO, n]), config(100)) for n in range(4)]
    for _ in range(5):
        p.step()
    used = [f"{p.get_metrics().cache_usage:.1f} % of the cache used by four"]
    handles[1].cancel()
    for n in (1, 2):
        p.step()
        used.append(f"{p.get_metrics().cache_usage:.1f} % in step {n} after one was cancelled")
    used.append(f"reading the cancelled one: {error_of(handles[1].read)}")
    for handle in handles:
        handle.cancel()
    p.step()
    return "\n".join([*used, f"requests one step after all were cancelled: {int(p.has_non_finished_requests())}"])


def adding_while_a_step_runs() -> str:
    p, is_over, failures = pipeline(), threading.Event(), []

    def step() -> None:
        while not is_over.is_set():
            if failure := error_of(p.step):
                failures.append(failure)
                return

    thread = threading.Thread(target=step)
    thread.start()
    handles = []
    for n in range(300):
        handles.append(p.add_request(n, tensor([5 + n % 300] * (1 + n % 40)), config(5)))
        if n % 3 == 0:
            handles[n // 2].cancel()
    while p.has_non_finished_requests() and not failures:
        is_over.wait(0.01)
    is_over.set()
    thread.join()
    return f"{failures or 'no failure'}, {dict(Counter(handle.get_status().name for handle in handles))}"


def churn() -> str:
    """Measure memory over 2,000 requests, half of them cancelled."""
    p, rng, mib = pipeline(), np.random.default_rng(0), []
    for n in range(2000):
        prompt = [int(t) for t in rng.integers(5, 380, rng.integers(1, 60))]
        handle = p.add_request(n, tensor(prompt), config(20, do_sample=True, rng_seed=n))
        for _ in range(rng.integers(0, 4)):
            p.step()
        if rng.random() < 0.5:
            handle.cancel()
        while n % 8 == 7 and p.has_non_finished_requests():
            p.step()
        if n % 200 == 199:
            mib.append(rss_mib())
    return f"MiB after each 200: {mib}"


def reserved_memory() -> str:
    before = rss_mib()
    p = pipeline(num_kv_blocks=400_000)
    p.add_request(1, tensor(HELLO), config(1))
    p.step()
    return f"{p.get_metrics().cache_size_in_bytes // 2**20} MiB of cache take {rss_mib() - before} MiB before use"


def not_a_number() -> str:
    """Make the logits of a request NaN."""
    ways: list[dict[str, Any]] = [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "top_p": 0.9},
        {"logprobs": 1},
    ]
    with tempfile.TemporaryDirectory() as directory:
        poison(Path(directory), 77)
        results = []
        for way in ways:
            p = pipeline(Path(directory))
            results.append(
                f"{way}: {outcomes(p, lambda p=p, way=way: p.add_request(2, tensor([77]), config(5, **way)))}"
            )
            print(results[-1], flush=True)
    return ""


def seeds() -> str:
    way = {"do_sample": True, "rng_seed": 42}
    p = pipeline()
    alone = drain(p, p.add_request(1, tensor(HELLO), config(30, **way)))
    others = [p.add_request(10 + n, tensor([20 + n]), config(50, do_sample=True, rng_seed=n)) for n in range(5)]
    p.step()
    together = drain(p, p.add_request(2, tensor(HELLO), config(30, **way)))
    wide = drain(p, p.add_request(3, tensor(HELLO), config(30, do_sample=True, rng_seed=42 + 2**32)))
    del others
    return f"same answer next to others: {alone == together}; same for seeds that differ above 32 bits: {alone == wide}"


def penalties() -> str:
    """Determine the effect of a frequency penalty on negative logits."""
    model = openvino.Core().compile_model(TINY / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def expected(adds_below_zero: bool) -> list[int]:
        ids = list(HELLO)
        for _ in range(120):
            length = len(ids)
            request = model.create_infer_request()
            inputs = {"input_ids": [ids], "attention_mask": [[1] * length], "position_ids": [[*range(length)]]}
            arrays = {name: np.array(value, dtype=np.int64) for name, value in inputs.items()}
            logits = request.infer(arrays | {"beam_idx": np.zeros(1, dtype=np.int32)})["logits"][0, -1].copy()
            for token, count in Counter(ids[len(HELLO) :]).items():
                logits[token] += 2.0 * count * (1 if adds_below_zero and logits[token] < 0 else -1)
            ids.append(int(logits.argmax()))
        return ids[len(HELLO) :]

    p = pipeline()
    got, _ = drain(p, p.add_request(1, tensor(HELLO), config(120, frequency_penalty=2.0)))
    return f"subtracted from every logit: {got == expected(False)}; added to negative ones: {got == expected(True)}"


PROBES: dict[str, Callable[[], str]] = {
    probe.__name__: probe
    for probe in (
        lock,
        token_ids_out_of_range,
        empty_prompt,
        prompt_longer_than_the_context,
        prompt_larger_than_the_cache,
        more_requests_than_the_cache_holds,
        same_prefixes,
        cancelled_request_holds_all_blocks,
        same_request_id_twice,
        after_an_exception,
        cancel,
        adding_while_a_step_runs,
        churn,
        reserved_memory,
        not_a_number,
        seeds,
        penalties,
    )
}

# --- helpers ------------------------------------------------------------------------------------------------------


def pipeline(directory: Path = TINY, **options: Any) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    defaults = {"num_kv_blocks": 64, "max_num_batched_tokens": 256, "enable_prefix_caching": True}
    for name, value in (defaults | options).items():
        setattr(scheduler, name, value)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", exact)


def config(max_new_tokens: int, **more: Any) -> Any:
    made = openvino_genai.GenerationConfig()
    for name, value in ({"max_new_tokens": max_new_tokens, "ignore_eos": True, "do_sample": False} | more).items():
        setattr(made, name, value)
    return made


def tensor(ids: list[int]) -> Any:
    return openvino.Tensor(np.array([ids], dtype=np.int64))


def drain(p: Any, handle: Any) -> tuple[list[int], str]:
    """Run one request to its end; return its tokens and final status."""
    tokens: list[int] = []
    for _ in range(200):
        while handle.can_read():
            for output in handle.read().values():
                tokens += output.generated_ids
        if handle.get_status() != STATUS.RUNNING:
            break
        p.step()
    return tokens, handle.get_status().name


def outcomes(p: Any, add: Callable[[], Any], others_number: int = 1000) -> str:
    """Describe the outcome of a request, of one that runs next to it, and of a later one."""
    good = tensor(HELLO)
    expected = drain(p, p.add_request(999, good, config(10)))
    other = p.add_request(others_number, good, config(10))
    p.step()
    results = []
    for name, do in (
        ("it", lambda: drain(p, add())),
        ("next to it", lambda: drain(p, other)),
        ("after", lambda: drain(p, p.add_request(1001, good, config(10)))),
    ):
        try:
            result = do()
            text = "unharmed" if name != "it" and result == expected else str(result)
        except Exception as error:
            text = "raised " + str(error).strip().splitlines()[-1]
        results.append(f"{name}: {text}")
    return "; ".join(results)


def error_of(do: Callable[[], Any]) -> str:
    """Return the last line of the raised error, or an empty string."""
    try:
        do()
    except Exception as error:
        return "raised " + str(error).strip().splitlines()[-1]
    return ""


def poison(directory: Path, token_id: int) -> None:
    """Save the model with NaN as the embedding of one token."""
    model = openvino.Core().read_model(TINY / "openvino_model.xml")
    (table,) = [op for op in model.get_ops() if op.get_friendly_name() == "self.model.embed_tokens.weight"]
    poisoned = np.array(table.data)
    poisoned[token_id] = np.nan
    for target in table.output(0).get_target_inputs():
        target.replace_source_output(opset13.constant(poisoned).output(0))
    openvino.save_model(model, directory / "openvino_model.xml", compress_to_fp16=False)
    (directory / "config.json").write_bytes((TINY / "config.json").read_bytes())


def rss_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


if __name__ == "__main__":
    main()
