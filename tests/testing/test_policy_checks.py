"""`check_policy` lets every policy of the package pass, and names the promise that a sabotaged one breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chatstream.scheduler import QUEUES, FifoQueue, KeyedQueue, LiveRequest, SchedulerSettings
from chatstream.testing import check_policy


@pytest.mark.parametrize("policy", QUEUES)
def test_every_policy_of_the_package_passes(policy: str) -> None:
    settings = SchedulerSettings(client_weights={"client 0": 3.0})
    check_policy(lambda: QUEUES[policy](settings))


class TakesHeld(FifoQueue):
    def push(self, request: LiveRequest, *, held: bool) -> None:
        super().push(request, held=False)


class ForgetsWhoComesBack(FifoQueue):
    def push(self, request: LiveRequest, *, held: bool) -> None:
        if not request.is_preempted:
            super().push(request, held=held)


class TakesTwice(FifoQueue):
    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        request = super().take(may_start_new=may_start_new)
        if request is not None and request.seq % 5 == 0:
            self.push(request, held=False)
        return request


class CountsFromZero(FifoQueue):
    def position(self, request: LiveRequest) -> int:
        return super().position(request) - 1


class DoesNotCountHeld(FifoQueue):
    def __init__(self) -> None:
        super().__init__()
        self.held: set[LiveRequest] = set()

    def push(self, request: LiveRequest, *, held: bool) -> None:
        super().push(request, held=held)
        if held:
            self.held.add(request)

    def unhold(self, request: LiveRequest) -> None:
        super().unhold(request)
        self.held.remove(request)

    def __len__(self) -> int:
        return super().__len__() - len(self.held & set(self))


class IteratesAsItLikes(FifoQueue):
    def __iter__(self) -> Iterator[LiveRequest]:
        return reversed([*super().__iter__()])


class SuccessorRemoves(FifoQueue):
    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        return self.take(may_start_new=may_start_new)

    def start(self, request: LiveRequest) -> None:
        pass


class SuccessorIsHeld(FifoQueue):
    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        return next(iter(self), None) if may_start_new else super().successor(running, may_start_new=False)


class SuccessorStays(FifoQueue):
    def start(self, request: LiveRequest) -> None:
        pass


class IgnoresMayGrow(FifoQueue):
    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        return super().take()


class OnePerClient(FifoQueue):
    """A limit of its own, where the scheduler expects that a free slot is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[str] = []

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        request = super().take(may_start_new=may_start_new)
        if request is not None and request.client in self.clients:
            self.push(request, held=False)
            return None
        self.clients += [request.client] if request is not None else []
        return request

    def end_run(self, request: LiveRequest) -> None:
        if request.client in self.clients:
            self.clients.remove(request.client)


class LastFirst(KeyedQueue):
    is_exact = True  # it is not

    def key(self, request: LiveRequest) -> float:
        return -request.seq


class CannotDiscardHeld(FifoQueue):
    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()

    def push(self, request: LiveRequest, *, held: bool) -> None:
        super().push(request, held=held)
        if held:
            self.held.add(request.seq)

    def unhold(self, request: LiveRequest) -> None:
        super().unhold(request)
        self.held.remove(request.seq)

    def withdraw(self, request: LiveRequest) -> None:
        if request.seq in self.held:
            raise KeyError(request.seq)
        super().withdraw(request)


class KnowsNoStrangers(FifoQueue):
    """It keeps accounts of those it has seen start, and expects that those are all."""

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[int, int] = {}

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        request = super().take(may_start_new=may_start_new)
        if request is not None:
            self.served.setdefault(request.seq, 0)
        return request

    def start(self, request: LiveRequest) -> None:
        super().start(request)
        self.served.setdefault(request.seq, 0)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        self.served[request.seq] += tokens


class RemembersEverybody(FifoQueue):
    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[str, int] = {}

    def end_run(self, request: LiveRequest) -> None:
        self.clients[request.client] = self.clients.get(request.client, 0) + 1


@pytest.mark.parametrize(
    ("queue", "promise"),
    [
        (TakesHeld, "nobody starts who is held: "),
        (ForgetsWhoComesBack, r"those in line are those who wait .*push\(r\d+, held=False, is_preempted\)"),
        (TakesTwice, "those in line are those who wait "),
        (CountsFromZero, "positions are 1, 2, 3 "),
        (DoesNotCountHeld, "len counts everybody in line, "),
        (IteratesAsItLikes, "positions are 1, 2, 3 "),
        (SuccessorRemoves, "successor only looks; "),
        (SuccessorIsHeld, r"nobody starts who is held: .*successor\(r\d+, may_start_new=True\) = r"),
        (SuccessorStays, r"those in line are those who wait .*start\(r\d+\)$"),
        (IgnoresMayGrow, "only preempted requests may start: "),
        (OnePerClient, "take returns somebody when somebody may start: "),
        (LastFirst, "an exact position never grows: "),
        (CannotDiscardHeld, r"no call raises: KeyError.*withdraw\(r\d+\)$"),
        (KnowsNoStrangers, r"no call raises: KeyError.*charge\(r\d+, "),
        (RemembersEverybody, "clients that came and went are forgotten: "),
    ],
)
def test_each_sabotage_is_found_and_named(queue: type[KeyedQueue], promise: str) -> None:
    with pytest.raises(AssertionError, match=f"^{promise}"):
        check_policy(queue)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_says_the_same_and_tells_only_of_the_last_calls(seed: int) -> None:
    said = set()
    for _ in range(2):
        with pytest.raises(AssertionError) as failure:
            check_policy(IgnoresMayGrow, seed=seed)
        said.add(str(failure.value))
    (message,) = said
    assert 1 <= len(message.split("; after ")[1].split("), ")) <= 10
