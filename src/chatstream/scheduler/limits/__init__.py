"""The concurrency limit: the maximum number of running requests.

    fixed.py      the limit that the operator set
    adaptive.py   a limit that follows the gaps between tokens
    step_time.py  the duration of a step by number of running requests, for `adaptive.py`

Knows no requests, only numbers and times.
"""

from chatstream.scheduler.limits.fixed import ConcurrencyLimit, FixedLimit

__all__ = ["ConcurrencyLimit", "FixedLimit"]
