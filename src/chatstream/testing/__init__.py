"""Doubles and checkers for those who build on ChatStream; our own tests use the same ones."""

from chatstream.testing.history import History, InvalidHistory

__all__ = ["History", "InvalidHistory"]
