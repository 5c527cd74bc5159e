"""Doubles and checkers for those who build on ChatStream; our own tests use the same ones."""

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
