"""ChatStream in a FastAPI application, with the bundled demo model.

    uvicorn --app-dir examples fastapi_app:app

Then, in another terminal:

    curl -N -H "Accept: text/event-stream" -d '{"user_input": "Hello"}' http://127.0.0.1:8000/chat/chat_stream

The answer arrives word by word. The chat page is at http://127.0.0.1:8000/chat/. The application's own endpoint at
http://127.0.0.1:8000/ responds while the model generates.
"""

from __future__ import annotations

from fastapi import FastAPI

from chatstream import ChatStream

# With a model of your own: ChatStream("Qwen/Qwen3-0.6B", ...)
chat_stream = ChatStream(max_concurrency=2, max_queue_size=5)

app = FastAPI(lifespan=chat_stream.lifespan)
app.include_router(chat_stream.router, prefix="/chat")


@app.get("/")
async def load() -> dict[str, int]:
    """The number of running and waiting requests."""
    stats = chat_stream.stats()
    return {"running": stats.running, "waiting": stats.waiting}
