"""The official OpenAI client against a ChatStream server.

    chatstream serve

In another terminal:

    pip install openai
    python examples/openai_client.py http://127.0.0.1:8000

Prints a streamed answer, then a complete one. When the queue is full, the client waits for the time in Retry-After and
tries again by itself, here up to five times.
"""

from __future__ import annotations

import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none needed unless the server has --api-key", max_retries=5)

try:
    # No retries: this request never waits in the queue, so a failure means that there is no server.
    model = client.with_options(max_retries=0).models.list().data[0].id
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"  ({chunk.usage.completion_tokens} tokens)")

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What are you?"}],
        max_completion_tokens=40,
        extra_body={"max_wait_seconds": 30},
    )
    print(answer.choices[0].message.content)
except openai.RateLimitError as error:
    seconds = error.response.headers["retry-after"]
    sys.exit(f"Still rejected ({error.code}). Try again in {seconds} s.")
except openai.APIConnectionError:
    sys.exit(f"No server answers at {url}. Start one: chatstream serve")
