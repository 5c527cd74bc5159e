"""HTTP in and out: parses, calls the facade, frames. Knows no policy.

native.py     /chat_stream and its relatives      openai.py     /v1/...
streaming.py  a response that notices when its client leaves or stops reading
resuming.py   a stream that goes on in a later response
framing.py    events to bytes, one class a wire format (pure)
errors.py     errors to responses, both dialects, one table
bodies.py     request bodies: read with a limit, checked, refused by name
openapi.py    endpoints in the OpenAPI document
app.py        all of it as a router or an application
"""
