"""An engine for models whose batches ChatStream composes: one step generates a token for every running request.

    engine.py         `StepEngine`, the `Engine` on the event loop
    loop.py           the step loop, in the engine thread
    sequence.py       one request in the loop: its tokens, and how many of them the model has computed
    model.py          what the loop requires of a model: `ModelRunner`
    prefix_cache.py   computed state of earlier sequences, for sequences that begin with the same tokens
    prompt_budget.py  how many prompt tokens one step may carry
    token_mask.py     calls a request's token mask and validates the result

Knows no array library, no HTTP, no queue.
"""
