"""The key that sent a request may cancel it, until the request is forgotten."""

from __future__ import annotations

from chatstream.ownership import REMEMBERED_S, RequestOwners


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_only_the_key_that_sent_a_request_owns_it() -> None:
    owners = RequestOwners(Clock())
    owners.add("r", "key")
    assert owners.is_owner("r", "key")
    assert not owners.is_owner("r", "other")
    assert not owners.is_owner("unknown", "key")


def test_without_keys_the_id_is_enough_but_an_unknown_id_is_owned_by_no_caller() -> None:
    owners = RequestOwners(Clock())
    owners.add("r", "")
    assert owners.is_owner("r", "")
    assert not owners.is_owner("unknown", "")


def test_an_ended_request_is_remembered_for_a_minute() -> None:
    clock = Clock()
    owners = RequestOwners(clock)
    owners.add("r", "key")
    owners.end("r")
    clock.now_s = REMEMBERED_S - 1
    assert owners.is_known("r")
    assert owners.is_owner("r", "key")
    clock.now_s = REMEMBERED_S + 1
    assert not owners.is_known("r")
    assert not owners.is_owner("r", "key")


def test_a_rejected_request_leaves_nothing_behind() -> None:
    owners = RequestOwners(Clock())
    owners.add("r", "key")
    owners.forget("r")
    owners.end("r")
    assert not owners.is_known("r")
    assert len(owners) == 0


def test_an_operator_may_cancel_every_known_request() -> None:
    owners = RequestOwners(Clock())
    owners.add("r", "key")
    assert owners.may_cancel("r", "other", is_admin=True)
    assert owners.may_cancel("r", "key", is_admin=False)
    assert not owners.may_cancel("r", "other", is_admin=False)
    assert not owners.may_cancel("unknown", "", is_admin=True)
