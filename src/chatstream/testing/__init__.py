"""Test doubles and checkers for applications, engines and policies. ChatStream's own tests use them too.

fake_engine.py     FakeEngine: an engine that plays a script
virtual_time.py    run_virtual: an event loop with a clock that jumps
shuffled_loop.py   run_shuffled: virtual time and a random order of callbacks
history.py         History: checks the scheduler's event log
engine_checks.py   check_engine: checks an engine against its contract
policy_checks.py   check_policy: checks a policy against its protocol
"""

from chatstream.testing.engine_checks import check_engine
from chatstream.testing.fake_engine import FakeEngine, Fault
from chatstream.testing.history import History, InvalidHistory
from chatstream.testing.policy_checks import check_policy
from chatstream.testing.shuffled_loop import ShuffledLoop, run_shuffled
from chatstream.testing.virtual_time import VirtualTimeLoop, run_virtual

__all__ = [
    "FakeEngine",
    "Fault",
    "History",
    "InvalidHistory",
    "ShuffledLoop",
    "VirtualTimeLoop",
    "check_engine",
    "check_policy",
    "run_shuffled",
    "run_virtual",
]
