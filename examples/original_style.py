"""The API of ChatStream 0.3: its names of the limits, its start, its endpoint, its wire format.

    uvicorn --app-dir examples original_style:app

Then, in another terminal:

    curl -N -d '{"user_input": "Hello", "regenerate": false}' http://127.0.0.1:8000/chat_stream

The client receives the whole answer so far with each new text, followed by <::EOS::>. At the end the server's terminal
shows how the request ended. FastAPI has deprecated `@app.on_event("startup")`; a lifespan replaces it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from chatstream import ChatStream

# With a model of your own: ChatStream(model=model, tokenizer=tokenizer, device="cuda", ...)
chat_stream = ChatStream(num_of_concurrent_executions=2, max_queue_size=5)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await chat_stream.start_queue_worker()
    yield
    await chat_stream.stop_queue_worker()


app = FastAPI(lifespan=lifespan)


def on_end(request: Request, message: str) -> None:
    print("a request has ended:", message, flush=True)


@app.post("/chat_stream")
async def stream_api(request: Request) -> Response:
    return await chat_stream.handle_chat_stream_request(request, callback=on_end)
