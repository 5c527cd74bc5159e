"""`check_policy` accepts every policy of the package, and names the rule that a broken policy violates."""

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


class LosesPreempted(FifoQueue):
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


class IteratesBackwards(FifoQueue):
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


class KeepsSuccessor(FifoQueue):
    def start(self, request: LiveRequest) -> None:
        pass


class IgnoresMayStartNew(FifoQueue):
    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        return super().take()


class OnePerClient(FifoQueue):
    """Adds its own limit, so that a slot stays free although a request is eligible."""

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
    is_exact = True  # wrong

    def key(self, request: LiveRequest) -> float:
        return -request.seq


class CannotWithdrawHeld(FifoQueue):
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


class ExpectsStarts(FifoQueue):
    """Fails for requests that started under another policy."""

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


class KeepsAllClients(FifoQueue):
    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[str, int] = {}

    def end_run(self, request: LiveRequest) -> None:
        self.clients[request.client] = self.clients.get(request.client, 0) + 1


@pytest.mark.parametrize(
    ("queue", "rule"),
    [
        (TakesHeld, "a held request does not start: "),
        (LosesPreempted, r"the queue contains exactly the waiting requests .*push\(r\d+, held=False, is_preempted\)"),
        (TakesTwice, "the queue contains exactly the waiting requests "),
        (CountsFromZero, "positions are 1, 2, 3 "),
        (DoesNotCountHeld, "len is the number of waiting requests, "),
        (IteratesBackwards, "positions are 1, 2, 3 "),
        (SuccessorRemoves, "successor does not change the queue; "),
        (SuccessorIsHeld, r"a held request does not start: .*successor\(r\d+, may_start_new=True\) = r"),
        (KeepsSuccessor, r"the queue contains exactly the waiting requests .*start\(r\d+\)$"),
        (IgnoresMayStartNew, "without may_start_new only a preempted request starts: "),
        (OnePerClient, "take returns a request when one is eligible: "),
        (LastFirst, "an exact position never grows: "),
        (CannotWithdrawHeld, r"no method raises: KeyError.*withdraw\(r\d+\)$"),
        (ExpectsStarts, r"no method raises: KeyError.*charge\(r\d+, "),
        (KeepsAllClients, "memory does not grow with past clients: "),
    ],
)
def test_a_broken_policy_is_reported_with_the_rule_that_it_violates(queue: type[KeyedQueue], rule: str) -> None:
    with pytest.raises(AssertionError, match=f"^{rule}"):
        check_policy(queue)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_message_with_the_last_calls(seed: int) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(AssertionError) as failure:
            check_policy(IgnoresMayStartNew, seed=seed)
        messages.add(str(failure.value))
    (message,) = messages
    assert 1 <= len(message.split("; after ")[1].split("), ")) <= 10
