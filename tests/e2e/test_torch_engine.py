"""`chatstream serve` with a tiny checkpoint in a child process: bad requests, and a kill."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from tests.cli.command import serving  # noqa: E402
from tests.e2e.test_engine_dies import child_of  # noqa: E402
from tests.engines.transformers import checkpoints  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")

BAD = {"~": (500, "engine_error"), "long " * 500: (400, "prompt_too_long"), "": (400, "invalid_request")}
NUM_BAD = 100
"""Bad requests of each kind."""
NUM_RUNNING, NUM_WAITING = 8, 5


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose logits for "~" are NaN."""
    path = checkpoints.save("llama", tmp_path_factory.mktemp("checkpoints") / "poisoned")
    (token_id,) = checkpoints.train_tokenizer().encode("~", add_special_tokens=False)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.get_input_embeddings().weight.data[token_id] = float("nan")
    model.save_pretrained(path)
    return path


def complete(client: httpx2.Client, prompt: str, max_tokens: int) -> httpx2.Response:
    messages = [{"role": "user", "content": prompt}] if prompt else []
    body = {"model": "poisoned", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return client.post("/v1/chat/completions", json=body)


def good_text(client: httpx2.Client) -> str:
    response = complete(client, "Hello", 100)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def good_texts(client: httpx2.Client, is_over: threading.Event) -> set[str]:
    """Send requests one after the other until the event is set; return the distinct answers."""
    texts = set()
    while not is_over.is_set():
        texts.add(good_text(client))
    return texts


def refusals(client: httpx2.Client, prompt: str) -> set[tuple[int, str]]:
    """Send the same bad request `NUM_BAD` times; return the distinct statuses and codes."""
    refused = [complete(client, prompt, 10) for _ in range(NUM_BAD)]
    return {(response.status_code, response.json()["error"]["code"]) for response in refused}


def test_bad_requests_fail_alone_and_after_a_kill_every_waiting_request_is_served(poisoned: Path) -> None:
    limits = ("--max-concurrency", str(NUM_RUNNING), "--max-queue-size", str(NUM_WAITING))
    with serving(str(poisoned), "--device", "cpu", *limits) as server, server.client() as client:
        expected = good_text(client)
        with ThreadPoolExecutor(NUM_RUNNING + NUM_WAITING) as pool:
            is_over = threading.Event()
            others = [pool.submit(good_texts, client, is_over) for _ in range(NUM_RUNNING - 3)]
            try:
                assert list(pool.map(partial(refusals, client), BAD)) == [{refusal} for refusal in BAD.values()]
            finally:
                is_over.set()
            assert [other.result() for other in others] == [{expected}] * len(others)
            assert client.get("/queue").json()["engine"]["batched"]

            os.kill(child_of(server), signal.SIGSTOP)  # so that all of them are admitted when it dies
            texts = [pool.submit(good_text, client) for _ in range(NUM_RUNNING + NUM_WAITING)]
            while client.get("/queue").json()["num_waiting"] < NUM_WAITING:
                pass
            os.kill(child_of(server), signal.SIGKILL)
            assert {text.result() for text in texts} == {expected}, "no request had a token, so all start again"
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        log = server.stderr()
    assert log.count("is ready again after") == 1
