"""The serving engine: what `generate` gives, whatever happens around a request."""

import importlib
import random
import sys
import threading
import time

import pytest
import torch

from tests.serving.serving import wait_for
from tests.small_models import KINDS, make_ready, small_model
from tnllm.errors import MissingExtra, RunError, UserError
from tnllm.generation import slots
from tnllm.generation.decoder import generate
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece, Result
from tnllm.serving import scheduler
from tnllm.serving.engine import Busy, Engine, Failed, PromptRead


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture(scope="module", params=KINDS, ids=["linear", "softmax", "hybrid"])
def each(request, tokenizer):
    """One model of each kind of state."""
    return make_ready(small_model(**request.param), tokenizer)


def alone(ready, ids, params):
    events = generate(ready.model, ready.tokenizer, [ids], params, eos_ids=ready.eos_ids)
    return sorted((event for event in events if isinstance(event, Result)), key=lambda result: result.sample)


def results(ticket):
    return sorted((event for event in ticket if isinstance(event, Result)), key=lambda result: result.sample)


def requests(ready, count, seed=0):
    """Prompts of many lengths, some with a shared beginning, with every sampling option."""
    draw = random.Random(seed)
    words = [
        "The",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "and",
        "the",
        "cat.",
        "今天天气很好，我们去公园。",
    ]
    shared = ready.encode(" ".join(draw.choices(words, k=30)))
    for number in range(count):
        ids = ready.encode(" ".join(draw.choices(words, k=draw.choice((1, 3, 10, 60)))))
        yield (
            (shared + ids if number % 3 == 0 else ids),
            SamplingParams(
                max_tokens=draw.choice((0, 1, 5, 20, 40)),
                temperature=draw.choice((0, 0.7, 1.0)),
                top_k=draw.choice((0, 0, 20)),
                top_p=draw.choice((1.0, 0.9)),
                repetition_penalty=draw.choice((1.0, 1.2)),
                frequency_penalty=draw.choice((0.0, 0.5)),
                seed=number,
                stop=draw.choice(((), ("e",), ("th", "好"))),
                logprobs=draw.choice((None, 0, 3)),
                n=draw.choice((1, 1, 2)),
            ),
        )


def assert_same(actual, expected):
    assert [r.tokens for r in actual] == [r.tokens for r in expected]
    assert [(r.text, r.finish_reason, r.seed) for r in actual] == [(r.text, r.finish_reason, r.seed) for r in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            # Order of sums in fp32, as for `batched = alone`.
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3) and len(a.top) == len(b.top)


@pytest.mark.slow
def test_every_request_gets_what_generate_gives(ready):
    wanted = list(requests(ready, 24))
    with Engine(ready, num_slots=5, prefill_tokens=32) as engine:
        tickets = []
        for number, (ids, params) in enumerate(wanted):
            tickets.append(engine.submit(ids, params, client=str(number % 3)))
            if number % 5 == 4:
                time.sleep(0.05)  # others are under way when the next ones come
        actual = [results(ticket) for ticket in tickets]
    assert engine.metrics.cached_tokens > 0, "the shared beginning was read again each time"
    for (ids, params), ours in zip(wanted, actual, strict=True):
        assert_same(ours, alone(ready, ids, params))
    assert engine.slots.free == 5 and engine.num_active == 0


@pytest.mark.parametrize("cache_bytes", [0, 1 << 24])
def test_prompts_that_come_together_read_their_prefix_once(each, cache_bytes):
    prefix, params = [5 + index % 40 for index in range(50)], SamplingParams(max_tokens=3, seed=1)
    prompts = [[*prefix, 60 + index, 70 + index] for index in range(5)] + [prefix, [9, 8, 7]]
    with Engine(each, num_slots=8, prefill_tokens=16, cache_bytes=cache_bytes) as engine:
        events = list(engine.submit_all(prompts, params))
    assert engine.metrics.prompt_tokens == len(prefix) + 5 * 2 + 3 and engine.metrics.cached_tokens == 5 * len(prefix)
    assert [event.cached_tokens for event in sorted(
        (event for event in events if isinstance(event, PromptRead)), key=lambda read: read.index
    )] == [0, 50, 50, 50, 50, 50, 0]  # fmt: skip
    for result in [event for event in events if isinstance(event, Result)]:
        assert_same([result], alone(each, prompts[result.index], params))


def test_a_prompt_whose_prefix_is_read_by_one_that_is_cancelled_reads_it_itself(ready):
    prefix, params = [5 + index % 40 for index in range(400)], SamplingParams(max_tokens=3, seed=1)
    engine = Engine(ready, num_slots=4, prefill_tokens=16)
    turn, turns = engine._turn, []

    def cancelling():
        turns.append([(job.done, job.behind is not None) for job in engine.scheduler.reading])
        if len(turns) == 3:
            first.cancel()
        return turn()

    engine._turn = cancelling
    with engine:
        with engine._wake:
            # Both are there before the engine's first turn.
            first, second = (engine.submit([*prefix, last], params) for last in (60, 61))
        assert_same(results(second), alone(ready, [*prefix, 61], params))
        with pytest.raises(RunError, match="cancelled"):
            list(first)
    assert any(behind for reading in turns for _, behind in reading)


@pytest.mark.slow
def test_parked_rows_continue_as_if_nothing_had_been(each, monkeypatch):
    """With turns of three tokens, rows are parked at every point of their texts, between the bytes of characters too."""
    ready = each
    monkeypatch.setattr(scheduler, "TURN_TOKENS", 3)
    wanted = list(requests(ready, 20, seed=2))
    with Engine(ready, num_slots=3) as engine:
        tickets = [engine.submit(ids, params, client=str(number % 7)) for number, (ids, params) in enumerate(wanted)]
        actual = [results(ticket) for ticket in tickets]
        assert "tnllm_samples_parked 0" in engine.metrics.text().splitlines()
    assert engine.metrics.parks > 20
    for (ids, params), ours in zip(wanted, actual, strict=True):
        assert_same(ours, alone(ready, ids, params))


@pytest.mark.parametrize("client", ["greedy", "modest"])
def test_a_request_for_every_slot_does_not_keep_them(ready, client):
    """Another one, of the same client or not, is begun between two steps, and the large one continues after it."""
    order = []
    large = SamplingParams(max_tokens=60_000, seed=1, n=8, ignore_eos=True)
    with Engine(ready, num_slots=4) as engine:
        ticket = engine.submit([5, 6], large, client="greedy", deliver=lambda events: order.append("large"))
        wait_for(lambda: not engine.slots.free)
        order.append("submitted")
        small = []

        def deliver(events):
            order.append("small")
            small.extend(events)

        engine.submit([7], SamplingParams(max_tokens=9, seed=2), client=client, deliver=deliver)
        wait_for(lambda: small and isinstance(small[-1], Result))
        between = order[order.index("submitted") : len(order) - order[::-1].index("small")]
        assert len(between) < 1 + 9 + 15, "it waited for the large one"
        assert engine.metrics.parks >= 1
        wait_for(lambda: not engine.slots.free)
        ticket.cancel()
    assert small[-1].tokens == alone(ready, [7], SamplingParams(max_tokens=9, seed=2))[0].tokens


class PlainStep:
    """A captured step without a graph: what the slots do on a GPU, on a CPU."""

    top_token = None

    def __init__(self, model, state, num_choices):
        self.model, self.state, self.batch = model, state, state.batch

    def __call__(self, tokens):
        return self.model.step(tokens, self.state)


def test_looking_ahead_and_unused_rows_change_nothing(ready, monkeypatch):
    """On a GPU steps run ahead of the host, in batches of a few fixed sizes; rows are parked all the same."""
    monkeypatch.setattr(scheduler, "TURN_TOKENS", 4)
    monkeypatch.setattr(slots, "can_capture", lambda model, steps: True)
    monkeypatch.setattr(slots, "CapturedStep", PlainStep)
    wanted = list(requests(ready, 20, seed=1))
    with Engine(ready, num_slots=5) as engine:
        tickets = [engine.submit(ids, params, client=str(number)) for number, (ids, params) in enumerate(wanted)]
        actual = [results(ticket) for ticket in tickets]
    assert engine.metrics.parks
    for (ids, params), ours in zip(wanted, actual, strict=True):
        assert_same(ours, alone(ready, ids, params))


@pytest.mark.gpu
def test_every_request_gets_what_generate_gives_on_a_gpu(tokenizer):
    model = small_model(model_dim=128, glu_dim=192).cuda()
    ready = make_ready(model, tokenizer)
    wanted = list(requests(ready, 24))
    with Engine(ready, num_slots=5, prefill_tokens=32) as engine:
        tickets = [engine.submit(ids, params) for ids, params in wanted]
        actual = [results(ticket) for ticket in tickets]
    for (ids, params), ours in zip(wanted, actual, strict=True):
        assert_same(ours, alone(ready, ids, params))


def test_pieces_add_up_and_come_after_the_prompt(ready):
    with Engine(ready, num_slots=2) as engine:
        events = list(engine.submit(ready.encode("The quick 今天"), SamplingParams(max_tokens=30, seed=2)))
    assert isinstance(events[0], PromptRead) and events[0].prompt_tokens == len(ready.encode("The quick 今天"))
    assert "".join(event.text for event in events if isinstance(event, Piece)) == events[-1].text
    assert len(events) == 2 + len(events[-1].tokens)


@pytest.mark.slow
def test_a_long_prompt_stalls_no_other_request(ready):
    """While 1,500 tokens are read, a running text gets a token per pass, and a short prompt comes through."""
    order = []
    long = ready.encode("The lazy dog. " * 400)[:1500]
    params = SamplingParams(max_tokens=300, seed=1, ignore_eos=True)
    with Engine(ready, num_slots=4, prefill_tokens=64, cache_bytes=0) as engine:
        engine.submit(ready.encode("The"), params, deliver=lambda events: order.extend(["run"] * len(events)))
        wait_for(lambda: order.count("run") >= 3)
        engine.submit(long, SamplingParams(max_tokens=1), deliver=lambda _: order.append("long"))
        engine.submit(ready.encode("A fox"), SamplingParams(max_tokens=1), deliver=lambda _: order.append("short"))
    start, end = 0, order.index("long")
    # 1500 / 64 passes with a decoding step after each; the first few may have come before.
    assert order[start:end].count("run") > 1500 / 64
    assert order.index("short") < end


def test_a_cancelled_request_frees_its_slot_and_touches_no_other(ready):
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    endless = SamplingParams(max_tokens=60_000, seed=6, ignore_eos=True)
    ids = ready.encode("The quick brown")
    with Engine(ready, num_slots=2, queue_size=4) as engine:
        doomed = [engine.submit(ids, endless) for _ in range(3)]  # two run, one waits
        first = iter(doomed[0])
        assert isinstance(next(first), PromptRead)
        patient = engine.submit(ids, params)
        for ticket in doomed:
            ticket.cancel()
        with pytest.raises(RunError, match="the request was cancelled"):
            list(first)
        assert_same(results(patient), alone(ready, ids, params))
        for ticket in doomed[1:]:
            with pytest.raises(RunError, match="cancelled"):
                list(ticket)
        assert engine.slots.free == 2 and engine.num_waiting == 0
    assert engine.metrics.cancelled == 3


def test_a_full_queue_refuses_with_a_time_to_come_back(ready):
    params = SamplingParams(max_tokens=60_000, ignore_eos=True)
    with Engine(ready, num_slots=1, queue_size=2) as engine:
        tickets = [engine.submit([5], params)]
        wait_for(lambda: not engine.slots.free)
        tickets += [engine.submit([5], params) for _ in range(2)]
        with pytest.raises(
            Busy, match="2 prompts are waiting, and the queue holds 2: there is no room for 1 more"
        ) as caught:
            engine.submit([5], params)
        assert 1 <= int(caught.value.headers["Retry-After"]) <= 60 and caught.value.code == "queue_full"
        for ticket in tickets:
            ticket.cancel()
    assert engine.metrics.refused == 1


def test_the_prompts_of_a_request_are_queued_together(ready):
    """All of them or none, with one ticket; an event says which prompt it is of."""
    params = SamplingParams(max_tokens=3, n=2, seed=1)
    prompts = [[5], [6, 7], [8]]
    with Engine(ready, num_slots=2, queue_size=3) as engine:
        with pytest.raises(UserError, match="the request has 4 prompts; the queue of this server holds 3"):
            engine.submit_all([*prompts, [9]], params)
        with pytest.raises(UserError, match="token id -1"):
            engine.submit_all([[5], [-1]], params)
        events = list(engine.submit_all(prompts, params))
        assert sorted(event.index for event in events if isinstance(event, PromptRead)) == [0, 1, 2]
        done = {(event.index, event.sample): event for event in events if isinstance(event, Result)}
        for index, ids in enumerate(prompts):
            assert_same([done[index, 0], done[index, 1]], alone(ready, ids, params))
        endless = engine.submit_all(prompts, SamplingParams(max_tokens=60_000, ignore_eos=True))
        endless.cancel()
        with pytest.raises(RunError, match="cancelled"):
            list(endless)
        assert engine.num_active == engine.num_waiting == 0 and engine.metrics.cancelled == 1


def test_prompts_without_texts_make_room_for_each_other(ready):
    """More at once than there are slots, while nothing is decoded."""
    with Engine(ready, num_slots=2) as engine:
        tickets = [engine.submit(ready.encode("The fox"), SamplingParams(max_tokens=0)) for _ in range(9)]
        assert [results(ticket)[0].text for ticket in tickets] == [""] * 9


def test_clients_take_turns(ready):
    done = []
    lock = threading.Lock()

    def deliver(name):
        def note(events):
            with lock:
                done.extend(name for event in events if isinstance(event, Result))

        return note

    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine = Engine(ready, num_slots=1, cache_bytes=0)
    for name in ["greedy"] * 20 + ["modest"]:
        engine._thread.is_alive = lambda: True  # queue everything before the first turn
        engine.submit([5, 6], params, client=name, deliver=deliver(name))
    del engine._thread.is_alive
    with engine:
        pass
    assert len(done) == 21 and done.index("modest") == 1


def test_draining_finishes_what_was_taken_and_refuses_the_rest(ready):
    engine = Engine(ready, num_slots=1)
    engine.start()
    tickets = [engine.submit([5], SamplingParams(max_tokens=20, seed=i, ignore_eos=True)) for i in range(3)]
    assert engine.drain() == 3
    with pytest.raises(Busy, match="shutting down") as caught:
        engine.submit([5], SamplingParams())
    assert caught.value.code == "shutting_down"
    assert engine.stop() == 0
    assert [len(results(ticket)[0].tokens) for ticket in tickets] == [20] * 3


def test_stopping_at_once_tells_everybody(ready):
    engine = Engine(ready, num_slots=1)
    engine.start()
    list(engine.submit([5], SamplingParams(max_tokens=0)))
    tickets = [engine.submit([5], SamplingParams(max_tokens=60_000, ignore_eos=True)) for _ in range(3)]
    assert engine.stop(finish=True, timeout_s=0.05) == 3
    for ticket in tickets:
        with pytest.raises(Busy, match="shut down before the text was finished"):
            list(ticket)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_fail_one_request_and_not_the_engine(tokenizer, kind):
    model = small_model(**kind)
    bad = tokenizer.unk_id
    model.embed_tokens.weight[bad] = torch.nan
    ready = make_ready(model, tokenizer)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    fine = tokenizer.encode("The quick")
    events = []
    with Engine(ready, num_slots=2) as engine:
        healthy = engine.submit(fine, SamplingParams(max_tokens=30, seed=3))
        engine.submit([bad], SamplingParams(max_tokens=5, n=2), deliver=events.extend)
        again = results(healthy)
        assert results(engine.submit(fine, params))[0].finish_reason == "length"
    assert again[0].tokens == alone(ready, fine, SamplingParams(max_tokens=30, seed=3))[0].tokens
    assert engine.drain() == 0, "a request that failed has ended"
    assert isinstance(events[1], Failed) and "non-finite logits near token 1" in str(events[1].error)


def test_prompt_logprobs_are_those_of_the_full_forward_pass(ready):
    ids = ready.encode("The quick brown fox jumps over the lazy dog. " * 5)
    params = SamplingParams(max_tokens=0, logprobs=2)
    with Engine(ready, num_slots=2, prefill_tokens=16) as engine:
        first = next(iter(engine.submit(ids, params, prompt_logprobs=2)))
    logits = ready.model(torch.tensor([ids]))[0][0]
    logits[:, ready.tokenizer.vocab_size :] = -torch.inf
    expected = logits.log_softmax(-1)
    assert first.logprobs[0] is None and len(first.logprobs) == len(ids)
    for index, entry in enumerate(first.logprobs[1:]):
        # Order of sums in fp32, logits of size 10.
        assert entry.id == ids[index + 1]
        assert entry.logprob == pytest.approx(expected[index, entry.id].item(), abs=1e-3)
        assert [top.logprob for top in entry.top] == pytest.approx(expected[index].topk(2).values.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 65, {}, "the prompt has 65 tokens; this server takes at most 64"),
        ([5], {"max_tokens": 101}, "max_tokens is 101; this server gives at most 100"),
        ([5, 99_999], {}, "token id 99999 is outside the vocabulary"),
        ([-1], {}, "token id -1 is outside the vocabulary"),
    ],
)
def test_requests_that_are_refused(ready, ids, params, message):
    engine = Engine(ready, num_slots=1, max_prompt_tokens=64, max_new_tokens=100)
    with pytest.raises(UserError, match=message):
        engine.submit(ids, SamplingParams(**{"max_tokens": 1, **params}))


def test_learned_positions_bound_a_request(tokenizer):
    model = small_model(position="ape", max_position=40)
    with pytest.raises(UserError, match="this model has learned 40 positions"):
        Engine(make_ready(model, tokenizer), num_slots=1).submit([5] * 30, SamplingParams(max_tokens=11))


def test_metrics_are_prometheus_text(ready):
    with Engine(ready, num_slots=2) as engine:
        results(engine.submit([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True)))
        text = engine.metrics.text()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines["tnllm_generated_tokens_total"] == "4" and lines["tnllm_prompt_tokens_total"] == "3"
    assert lines['tnllm_samples_finished_total{reason="length"}'] == "1"
    assert lines['tnllm_request_seconds_bucket{le="+Inf"}'] == lines["tnllm_request_seconds_count"] == "1"
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)) and text.endswith("\n")


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "tnllm.serving.metrics")
    with pytest.raises(MissingExtra, match=r"tnllm\[serve\]"):
        importlib.import_module("tnllm.serving.metrics")
