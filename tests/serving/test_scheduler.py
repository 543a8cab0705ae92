"""The scheduler as a value: jobs are names, samples are pairs, a step gives every running sample one token."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.serving.scheduler import TURN_TOKENS, Scheduler, fair_shares


@dataclass(eq=False)
class Job:
    client: str
    request: object
    num_samples: int = 1
    length: int = 1
    tokens: int = 1_000_000  # of each sample
    done: int = 0
    cache_at: int = 0
    behind: object | None = None
    ids: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.ids = [5] * self.length


class Server:
    """An engine without a model."""

    def __init__(self, num_slots, **more):
        self.scheduler = Scheduler(num_slots, **{"queue_size": 10_000, "max_parked": 10_000, **more})
        self.running, self.parked, self.given, self.parks, self.num_slots = [], set(), Counter(), 0, num_slots

    def submit(self, *args, **more):
        [job] = self.submit_all(1, *args, **more) or [None]
        return job

    def submit_all(self, prompts, *args, **more):
        jobs = [Job(*args, **more) for _ in range(prompts)]
        return jobs if self.scheduler.submit(jobs) else None

    def step(self, room=1 << 20):
        self.scheduler.admit()
        for job, tokens in list(self.scheduler.shares(room)):
            job.done += tokens
            if job.done == len(job.ids):
                self.scheduler.has_read(job, [(job, index) for index in range(job.num_samples)])
        lost, joined = self.scheduler.turns()
        for sample in lost:
            self.running.remove(sample)
            self.parked.add(sample)
        self.running += joined
        self.parked -= set(joined)
        self.parks += len(lost)
        assert len(self.running) <= self.num_slots and len(self.parked) == self.scheduler.num_parked
        for sample in list(self.running):
            self.given[sample] += 1
            self.scheduler.decoded(sample, 1)
            if self.given[sample] == sample[0].tokens:
                self.running.remove(sample)
                self.scheduler.ended(sample)

    def slots_of(self, job):
        return sum(sample[0] is job for sample in self.running)


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(0, 64))
def test_shares_are_even_and_nothing_is_left_over(needs, room):
    shares = fair_shares(needs, room)
    assert sum(shares) == min(room, sum(needs))
    for share, need in zip(shares, needs, strict=True):
        assert share <= need
        if share < need:
            assert all(other <= share + 1 for other in shares)
    unmet = [share for share, need in zip(shares, needs, strict=True) if share < need]
    assert unmet == sorted(unmet, reverse=True), "what does not divide goes to the first"


@pytest.mark.parametrize("client", ["other", "greedy"])
def test_one_large_request_leaves_room_for_another_at_once(client):
    """From another address or from the same one, and whether it is one prompt or many."""
    for prompts, samples in ((1, 128), (128, 1)):
        server = Server(32)
        jobs = server.submit_all(prompts, "greedy", "r", samples, tokens=65_536)
        for _ in range(10):
            server.step()
        assert len(server.running) == 32
        other = server.submit(client, "another", 1)
        many = server.submit(client, "a third", 40)
        server.step()
        assert server.slots_of(other) == 1
        assert server.slots_of(many) == 15
        assert sum(map(server.slots_of, jobs)) == 16
        for job in other, many:
            for sample in server.scheduler.remove(job):
                server.running.remove(sample)
        server.step()
        assert sum(map(server.slots_of, jobs)) == 32, "what was parked continues"
        assert server.parked == set()


def test_samples_of_a_request_are_in_order_and_parked_ones_come_first():
    server = Server(4)
    long = server.submit("a", "r", 10, tokens=50)
    for _ in range(5):
        server.step()
    short = server.submit("b", "s", 2, tokens=10)
    server.step()
    assert [sample[1] for sample in server.running if sample[0] is long] == [0, 1]
    while server.scheduler.num_requests:
        server.step()
        started = [sample for sample in server.given if sample[0] is long]
        assert [index for _, index in started] == list(range(len(started)))
        assert len(server.parked) <= 2
    assert set(server.given.values()) == {50, 10} and server.parks == 2
    assert server.given[short, 1] == 10


def test_more_clients_than_slots_take_turns():
    server = Server(4)
    jobs = [server.submit(str(number), number) for number in range(10)]
    steps = 10 * TURN_TOKENS
    for _ in range(steps):
        server.step()
    given = [server.given[job, 0] for job in jobs]
    assert max(given) - min(given) <= 2 * TURN_TOKENS
    # A turn lasts: no more changes than turns that fit.
    assert server.parks <= 4 * steps / TURN_TOKENS


def test_requests_of_one_client_take_turns_too_within_the_rows_set_aside():
    server = Server(4)
    jobs = [server.submit("a", number) for number in range(20)]
    for _ in range(20 * TURN_TOKENS):
        server.step()
        assert len(server.parked) <= 4
    given = [server.given[job, 0] for job in jobs]
    assert min(given[:8]) > 2 * TURN_TOKENS and set(given[8:]) == {0}
    other = server.submit("b", "r")
    server.step()
    assert server.slots_of(other) == 1, "another client does not wait for them"


def test_beyond_the_rows_set_aside_a_prompt_waits_for_a_free_slot():
    server = Server(2, max_parked=1)
    first = server.submit("a", 1, 2, tokens=30)
    server.step()
    others = [server.submit(client, client, tokens=30) for client in "bcd"]
    for _ in range(20):
        server.step()
    assert server.slots_of(others[0]) == 1 and len(server.parked) == 1 and server.slots_of(first) == 1
    while server.scheduler.num_requests:
        server.step()
    assert set(server.given.values()) == {30}


def test_short_texts_are_never_parked():
    server = Server(4)
    for number in range(200):
        server.submit("a", number, tokens=TURN_TOKENS)
    while server.scheduler.num_requests:
        server.step()
    assert server.parks == 0


def test_the_queue_has_a_part_for_every_client():
    server = Server(1, queue_size=8)
    server.submit("greedy", 0)
    server.step()
    assert all(server.submit("greedy", number) for number in range(1, 9))
    assert server.submit("greedy", 9) is None
    assert [bool(server.submit("modest", number)) for number in range(6)] == [True] * 4 + [False] * 2
    assert server.scheduler.num_waiting == 12


@pytest.mark.parametrize("prompts", [2, 3, 8])
def test_a_request_is_queued_whole_or_not_at_all(prompts):
    server = Server(1, queue_size=8)
    server.submit("greedy", 0)
    server.step()
    assert all(server.submit("greedy", number) for number in range(1, 8))
    before = server.scheduler.jobs
    assert server.submit_all(prompts, "greedy", "many") is None, "there is room for one"
    assert server.scheduler.jobs == before and server.scheduler.num_requests == 8
    assert bool(server.submit_all(prompts, "modest", "many")) == (prompts <= 4), (
        "half of the queue is for another client"
    )
    assert server.submit("greedy", "last") is None or prompts > 4


def test_a_short_prompt_is_read_beside_a_long_one():
    server = Server(4)
    long = server.submit("a", 1, length=10_000)
    short = server.submit("a", 2, length=50)
    paused = server.submit("b", 3, length=1000, cache_at=40)
    server.scheduler.admit()
    shares = dict(server.scheduler.shares(128))
    assert shares[long] == 64 and sum(shares.values()) <= 128
    assert shares[short] == 32 and shares[paused] == 32
    paused.done = 32
    assert dict(server.scheduler.shares(128))[paused] == 8, "a pass ends where the context is to be cached"


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_every_text_gets_its_tokens(data):
    server = Server(data.draw(st.integers(1, 5)), max_parked=data.draw(st.integers(0, 6)))
    alive, removed = [], []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "remove"]))
        if action == "submit":
            client, prompts = data.draw(st.sampled_from("abc")), data.draw(st.integers(1, 3))
            samples, tokens = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2 * TURN_TOKENS))
            alive += server.submit_all(prompts, client, object(), samples, data.draw(st.integers(1, 300)), tokens)
        elif action == "step":
            for _ in range(data.draw(st.integers(1, 300))):
                server.step(room=32)
        elif alive:
            job = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            if job in server.scheduler.jobs:
                removed.append(job)
                for sample in server.scheduler.remove(job):
                    server.running.remove(sample)
                server.parked -= {sample for sample in server.parked if sample[0] is job}
    for _ in range(100_000):
        if not server.scheduler.num_requests:
            break
        server.step(room=32)
    else:
        raise AssertionError("a text never ended")
    for job in alive:
        assert [server.given[job, index] for index in range(job.num_samples)] == [job.tokens] * job.num_samples
    assert server.running == [] and server.parked == set() and server.scheduler.num_active == 0
    assert server.scheduler.num_waiting == 0 and server.scheduler.jobs == []
