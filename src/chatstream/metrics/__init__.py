"""What ChatStream measures of itself.

    definitions   every metric: name, unit, meaning, formula, buckets
    recorder      from the scheduler's events to counts and times
    prometheus    from counts and times to Prometheus; the only module that knows its library

Knows the scheduler's events and `stats()`, no HTTP, no event loop, no clock: every time is an event's own.
"""
