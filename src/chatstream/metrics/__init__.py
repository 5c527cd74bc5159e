"""Metrics of ChatStream.

    definitions   all metrics: name, unit, meaning, buckets
    recorder      converts the scheduler's events to counts and durations
    prometheus    exports them to Prometheus; the only module that imports its library

Reads the scheduler's events and `stats()`. Uses no HTTP, event loop or clock: all times come from the events.
"""
