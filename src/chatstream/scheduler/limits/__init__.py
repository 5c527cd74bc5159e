"""How many requests may run.

    fixed.py      the number that the operator gave
    adaptive.py   a number that follows the gaps between tokens
    step_time.py  how long a step takes with so many running: what `adaptive` plans with

Knows no requests: numbers and times.
"""

from chatstream.scheduler.limits.fixed import ConcurrencyLimit, FixedLimit

__all__ = ["ConcurrencyLimit", "FixedLimit"]
