"""The parts of an engine for models whose batch is ours: one step generates a token for every running request.

    engine.py         the `Engine`, on the event loop's side
    loop.py           the step loop, in the engine thread
    sequence.py       one request in the loop: its tokens, and how many of them the model has computed
    model.py          what the loop needs of a model: `ModelRunner`
    prefix_cache.py   what was computed of earlier sequences, for sequences that begin alike
    prompt_budget.py  how many prompt tokens one step may carry
    token_mask.py     calls a request's token mask and checks its answer

Knows no array library, no HTTP, no queue.
"""
