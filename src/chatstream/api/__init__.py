"""HTTP: parses requests, calls the facade, frames its events. Knows no policy.

native.py     /chat_stream, conversations, cancelling      openai.py     /v1/...
operator.py   the queue and its control, health, metrics
legacy.py     the wire format and figures of ChatStream 0.3
streaming.py  the streaming response; detects a client that disconnects or stops reading
resuming.py   a stream that continues in a later response
framing.py    events to bytes: the interface, and the native format (pure)
errors.py     errors to responses, native and OpenAI shape
bodies.py     request bodies and queries: size limit, validation, errors that name the field
openapi.py    endpoints in the OpenAPI document
app.py        all endpoints as a router or as an application
"""
