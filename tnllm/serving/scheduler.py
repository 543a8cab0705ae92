"""Whose prompt is read and whose sample is decoded next: the engine's decisions as a value that knows no model.

    scheduler = Scheduler(num_slots=32, queue_size=512, max_parked=1000)
    scheduler.submit([job])                          # the prompts of a request; False if the queue has no room
    for job in scheduler.admit(): ...                # start to read these prompts
    for job, tokens in scheduler.shares(128): ...    # read so many tokens of each
    scheduler.has_read(job, samples)                 # its samples want slots
    parked, joined = scheduler.turns()               # samples that leave their slots for others, samples that take one
    scheduler.decoded(sample, 1)
    scheduler.ended(sample)

Slots are divided evenly among clients, and a client's slots evenly among its requests; what one does not need is the
others'. Within a request, prompts and samples are in order. A slot that does not divide, or is too few for all, goes to
who was given the fewest tokens, for TURN_TOKENS at least. So no request holds all slots, and none waits for another's end,
however long it is. A sample that loses its slot is parked: its state moves to host memory, and it continues later.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

# Tokens between two changes of who has a slot that several want equally. Most texts end sooner and are never parked.
TURN_TOKENS = 256
# A smaller part of a prompt is not worth its overhead in a pass.
_MIN_SHARE = 16


class Job(Protocol):
    """A prompt and what is asked of it."""

    client: str
    ids: np.ndarray
    done: int  # how many of them have been read
    cache_at: int  # a pass ends here, so that the context may be cached

    @property
    def behind(self) -> object | None:
        """An older prompt that is being read, whose context it waits for."""
        ...

    @property
    def request(self) -> Hashable:
        """What the prompts of one request share."""
        ...

    @property
    def num_samples(self) -> int: ...


J = TypeVar("J", bound=Job)
S = TypeVar("S", bound=Hashable)


@dataclass(eq=False)
class _Request(Generic[J, S]):
    key: Hashable
    client: "_Client[J, S]"
    served: int  # tokens
    waiting: deque[J] = field(default_factory=deque)
    reading: list[J] = field(default_factory=list)
    fresh: deque[S] = field(default_factory=deque)  # read, never decoded
    running: list[S] = field(default_factory=list)
    parked: list[S] = field(default_factory=list)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def wants(self) -> int:
        """Slots for what has been read."""
        return len(self.running) + len(self.parked) + len(self.fresh)

    def claims(self) -> int:
        """Slots for that and for what is being read."""
        return self.wants() + sum(job.num_samples for job in self.reading)

    def needs(self) -> int:
        """Slots for everything."""
        return self.claims() + sum(job.num_samples for job in self.waiting)

    def drop(self, sample: S) -> None:
        for samples in self.running, self.parked, self.fresh:
            if sample in samples:
                samples.remove(sample)


@dataclass(eq=False)
class _Client(Generic[J, S]):
    key: str
    served: int  # tokens
    requests: dict[Hashable, _Request[J, S]] = field(default_factory=dict)

    @property
    def num_running(self) -> int:
        return sum(len(request.running) for request in self.requests.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(request.waiting) for request in self.requests.values())

    @property
    def num_parked(self) -> int:
        return sum(len(request.parked) for request in self.requests.values())


class Scheduler(Generic[J, S]):
    """Not thread-safe."""

    def __init__(self, num_slots: int, queue_size: int, max_parked: int) -> None:
        """queue_size: prompts that may wait to be read. max_parked: beyond it a prompt is read for a free slot only."""
        self.num_slots, self.queue_size, self.max_parked = num_slots, queue_size, max_parked
        self.reading: list[J] = []  # in order of admission
        self._clients: dict[str, _Client[J, S]] = {}
        self._request_of: dict[J, _Request[J, S]] = {}
        self._samples: dict[J, list[S]] = {}  # that have not ended, of prompts that were read
        self._job_of: dict[S, J] = {}
        self._changed = False  # whether somebody's share may have changed
        self._changed_after_admit = False

    @property
    def jobs(self) -> list[J]:
        """All that have not ended."""
        return list(self._request_of)

    @property
    def num_requests(self) -> int:
        return sum(len(client.requests) for client in self._clients.values())

    @property
    def num_waiting(self) -> int:
        """Prompts in the queue."""
        return sum(client.num_waiting for client in self._clients.values())

    @property
    def num_parked(self) -> int:
        """Samples that lost their slot."""
        return sum(client.num_parked for client in self._clients.values())

    @property
    def num_active(self) -> int:
        """Prompts that are being read, and samples of those that were."""
        return len(self.reading) + len(self._job_of)

    def submit(self, jobs: Sequence[J]) -> bool:
        """Queue the prompts of a new request. Returns False, and queues none, if there is no room for all of them.

        Every client may have an even part of the queue, even if others have filled it.
        """
        first, client = jobs[0], self._clients.get(jobs[0].client)
        part = self.queue_size // (len(self._clients) + (client is None))
        own = client.num_waiting if client else 0
        if self.num_waiting + len(jobs) > self.queue_size and own + len(jobs) > part:
            return False
        if client is None:
            client = self._clients[first.client] = _Client(first.client, _start(self._clients.values()))
        request = _Request(first.request, client, _start(client.requests.values()), deque(jobs))
        client.requests[first.request] = request
        self._request_of.update(dict.fromkeys(jobs, request))
        self._changed = True
        return True

    def admit(self) -> list[J]:
        """Prompts to be read now, because their samples have a share of the slots."""
        admitted: list[J] = []
        if not (self._changed or self._changed_after_admit):
            return admitted
        self._changed_after_admit = False
        num_running, num_parked = sum(client.num_running for client in self._clients.values()), self.num_parked
        for request, share in self._shares_of(lambda request: request.needs()):
            while request.waiting and request.claims() < share:
                has_free_slot = num_running + len(self.reading) < self.num_slots
                # One client's rows must not fill the host memory that all share.
                may_park = num_parked < self.max_parked and request.client.num_parked < self.num_slots
                if not (has_free_slot or may_park):
                    break
                job = request.waiting.popleft()
                request.reading.append(job)
                self.reading.append(job)
                admitted.append(job)
        return admitted

    def shares(self, room: int) -> Iterator[tuple[J, int]]:
        """How many tokens of which prompts to read in a pass of `room` tokens.

        Half of the room is the oldest prompt's, so that it ends; the others share the rest, shortest first, so that a
        short prompt does not wait for long ones.
        """
        if not self.reading:
            return
        oldest, *others = (job for job in self.reading if job.behind is None)
        others.sort(key=lambda job: len(job.ids) - job.done)
        for index, job in enumerate([oldest, *others]):
            if room <= 0:
                return
            most = max(_MIN_SHARE, room // 2 if index == 0 else room // (len(others) - index + 1))
            share = min(len(job.ids) - job.done, most if others else room)
            if job.done < job.cache_at < job.done + share:
                share = job.cache_at - job.done
            room -= share
            yield job, share

    def has_read(self, job: J, samples: Sequence[S]) -> None:
        """A prompt was read: its samples want slots. Without any it has ended."""
        self.reading.remove(job)
        request = self._request_of[job]
        request.reading.remove(job)
        request.fresh.extend(samples)
        self._samples[job] = list(samples)
        self._job_of.update(dict.fromkeys(samples, job))
        self._changed = True
        if not samples:
            self.remove(job)

    def turns(self) -> tuple[list[S], list[S]]:
        """Samples to be parked, then samples to be put into the slots that are free now."""
        parked: list[S] = []
        joined: list[S] = []
        if not self._changed:
            return parked, joined
        # A prompt that was read without samples has made room for another, and nothing else may change.
        self._changed, self._changed_after_admit = False, True
        for request, share in self._shares_of(lambda request: request.wants()):
            lost, request.running = request.running[share:], request.running[:share]
            request.parked = lost + request.parked
            parked += lost
            while len(request.running) < share:
                sample = request.parked.pop(0) if request.parked else request.fresh.popleft()
                request.running.append(sample)
                joined.append(sample)
        return parked, joined

    def decoded(self, sample: S, num_tokens: int) -> None:
        """A sample was given tokens."""
        request = self._request_of[self._job_of[sample]]
        for one in request, request.client:
            self._changed |= one.served // TURN_TOKENS != (one.served + num_tokens) // TURN_TOKENS
            one.served += num_tokens

    def ended(self, sample: S) -> bool:
        """A sample has ended, and its slot is free. Returns whether it was the last of its prompt."""
        job = self._job_of.pop(sample)
        self._request_of[job].drop(sample)
        self._samples[job].remove(sample)
        self._changed = True
        if not self._samples[job]:
            self.remove(job)
        return job not in self._request_of

    def remove(self, job: J) -> list[S]:
        """Forget a prompt, wherever it is. Returns its samples that hold slots."""
        request = self._request_of.pop(job)
        samples = self._samples.pop(job, [])
        running = [sample for sample in samples if sample in request.running]
        for sample in samples:
            del self._job_of[sample]
            request.drop(sample)
        for jobs in request.waiting, request.reading, self.reading:
            if job in jobs:
                jobs.remove(job)
        if not request.needs():
            del request.client.requests[request.key]
            if not request.client.requests:
                del self._clients[request.client.key]
        self._changed = True
        return running

    def _shares_of(self, slots: Callable[[_Request[J, S]], int]) -> Iterator[tuple[_Request[J, S], int]]:
        """Each request's share of the slots, where `slots` says how many a request could use."""
        clients = sorted(self._clients.values(), key=_rank)
        needs = [sum(map(slots, client.requests.values())) for client in clients]
        for client, room in zip(clients, fair_shares(needs, self.num_slots), strict=True):
            requests = sorted(client.requests.values(), key=_rank)
            yield from zip(requests, fair_shares([slots(request) for request in requests], room), strict=True)


def _rank(one: _Client[J, S] | _Request[J, S]) -> tuple[int, int, int]:
    """Who comes first where a slot does not divide. Within a turn it stays where it is."""
    return one.served // TURN_TOKENS, -one.num_running, one.served


def _start(others: Iterable[_Client[J, S]] | Iterable[_Request[J, S]]) -> int:
    """Who comes is treated as those who were given the least, not as somebody who was given nothing for hours."""
    return min((other.served for other in others), default=0) // TURN_TOKENS * TURN_TOKENS


def fair_shares(needs: Sequence[int], room: int) -> list[int]:
    """Divide `room` evenly; no share exceeds its need, and what does not divide goes to the first."""
    shares = [0] * len(needs)
    while unmet := [index for index, need in enumerate(needs) if shares[index] < need]:
        if room < len(unmet):
            for index in unmet[:room]:
                shares[index] += 1
            break
        more = min(room // len(unmet), min(needs[index] - shares[index] for index in unmet))
        for index in unmet:
            shares[index] += more
        room -= more * len(unmet)
    return shares
