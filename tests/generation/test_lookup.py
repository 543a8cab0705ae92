"""Prompt lookup changes no text, and does accept what repeats."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generation.test_decoder import one, results
from tests.small_models import KINDS, make_ready, small_model
from tnllm.errors import UserError
from tnllm.generation import lookup as lookup_module
from tnllm.generation import slots
from tnllm.generation.context import load_context, read, save_context, weights_hash
from tnllm.generation.conversation import Conversation
from tnllm.generation.decoder import generate
from tnllm.generation.lookup import MIN_MATCH, WORTH, Lookup
from tnllm.generation.sampler import Options, SamplingParams, sample_ids, sample_surely
from tnllm.generation.slots import Slots
from tnllm.serving.engine import Engine

# Each kind of state, each form of position, and a model whose chunk is not the flat one.
FORMS = [*KINDS, {"position": "lrpe"}, {"position": "ape"}, {"norm_position": "output", "gate": "low-rank"}]
COUNT = 6


@pytest.fixture(scope="module")
def models():
    return [small_model(**form) for form in FORMS]


@pytest.fixture
def passes(monkeypatch):
    """(tokens kept, of how many read) of every pass that was verified."""
    kept, accept = [], Slots._accept

    def counted(self, row, fed, waits, count):
        kept.append((count, len(fed) - waits + 1))
        accept(self, row, fed, waits, count)

    monkeypatch.setattr(Slots, "_accept", counted)
    return kept


class Oracle(Lookup):
    """Proposes what will follow in `text`, with faults at random: random models do not repeat themselves."""

    def propose(self):
        draw = random.Random(self.seed * 1000 + self.done)
        right = self.text[self.done : self.done + self._count] if draw.random() < 0.7 else []
        return [token if draw.random() < 0.85 else draw.randrange(3, 340) for token in right]

    def push(self, token):
        self.done += 1

    def verified(self, right):
        pass

    @classmethod
    def of(cls, text, seed):
        def make(ids, count):
            oracle = cls((), count)
            oracle.done, oracle.text, oracle.seed = 0, text, seed
            return oracle

        return make


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_text_is_that_of_steps_alone(models, tokenizer, data):
    draw = data.draw
    params = {
        "max_tokens": draw(st.sampled_from([1, WORTH, 30, 60])),
        "temperature": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "top_k": draw(st.sampled_from([0, 5])),
        "top_p": draw(st.sampled_from([1.0, 0.9])),
        "min_p": draw(st.sampled_from([0.0, 0.05])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.7])),
        "logprobs": draw(st.sampled_from([None, 2])),
        "logit_bias": draw(st.sampled_from([(), ((7, 2.0),)])),
        "stop": draw(st.sampled_from([(), ("e",), ("th", "好")])),
        "ignore_eos": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }
    model, prompt = draw(st.sampled_from(models)), draw(st.sampled_from(["The quick brown fox", "今天", "a b c"]))
    plain = one(model, tokenizer, prompt, SamplingParams(**params))
    keep = draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnllm.generation.samples.Lookup", Oracle.of(plain.tokens, draw(st.integers(0, 10**6))))
        looked = one(model, tokenizer, prompt, SamplingParams(**params, prompt_lookup=COUNT), keep_contexts=keep)
    assert (looked.tokens, looked.text, looked.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    for ours, theirs in zip(looked.logprobs or [], plain.logprobs or [], strict=True):
        # See the tolerance of step logits.
        assert (ours.id, ours.logprob) == (theirs.id, pytest.approx(theirs.logprob, abs=2e-4))
    if keep and looked.tokens:
        [context] = read(model, [tokenizer.encode(prompt) + looked.tokens])
        assert looked.context.num_tokens == context.num_tokens
        assert looked.context.seen.equal(context.seen) and looked.context.tail == context.tail
        torch.testing.assert_close(looked.context.logits, context.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_right_proposals_are_accepted_and_wrong_ones_rolled_back(form, tokenizer, monkeypatch, passes):
    model, params = small_model(**form), {"max_tokens": 80, "seed": 4, "ignore_eos": True}
    plain = one(model, tokenizer, "The", SamplingParams(**params))
    monkeypatch.setattr("tnllm.generation.samples.Lookup", Oracle.of(plain.tokens, 1))
    assert one(model, tokenizer, "The", SamplingParams(**params, prompt_lookup=COUNT)).tokens == plain.tokens
    counts = {count for count, _ in passes}
    assert {1, COUNT + 1} < counts, "none, all and some of a proposal"
    assert sum(count for count, _ in passes) > 50


@pytest.mark.parametrize("form", KINDS, ids=["linear", "softmax", "hybrid"])
def test_a_repeated_text_takes_few_passes(form, tokenizer, passes):
    """One token over and over, by a bias; every proposal is right."""
    model = small_model(**form)
    params = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True, "logit_bias": ((50, 100.0),)}
    looked = one(model, tokenizer, "The", SamplingParams(**params, prompt_lookup=16))
    assert looked.tokens == [50] * 100
    # MIN_MATCH + 1 tokens until the text has followed itself for as long, then 17 a pass; the last few by steps.
    assert [count for count, _ in passes] == [17] * 5 + [6]


def test_near_ties_are_decided_by_steps(tokenizer, monkeypatch):
    """Two tokens whose logits are equal but for rounding: a pass rounds otherwise, and the text stays the same."""
    model = small_model()
    weight = model.lm_head.weight
    # Half of the vocabulary in pairs that differ in the last bits.
    weight[100:200] = weight[200:300] * (1 + 1e-7 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0)))
    read_again, count = Slots._read_again, itertools.count()
    monkeypatch.setattr(Slots, "_read_again", lambda self: (next(count), read_again(self)))
    for seed in range(4):
        params = {"max_tokens": 80, "temperature": 0.0 if seed == 0 else 0.8, "seed": seed, "ignore_eos": True}
        with pytest.MonkeyPatch.context() as patch:
            plain = one(model, tokenizer, "The", SamplingParams(**params))
            patch.setattr("tnllm.generation.samples.Lookup", Oracle.of(plain.tokens, seed))
            assert one(model, tokenizer, "The", SamplingParams(**params, prompt_lookup=COUNT)).tokens == plain.tokens
    assert next(count) > 2


@given(
    st.integers(0, 10**6), st.sampled_from([0, 1, 3, 20]), st.sampled_from([1.0, 0.9, 0.5]), st.sampled_from([0, 0.1]),
    st.sampled_from([0.0, 0.7]),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_a_sure_token_survives_rounding(seed, top_k, top_p, min_p, temperature):
    """Logits moved by less than the bound, ties among them, give the same token wherever it is said to be sure."""
    generator = torch.Generator().manual_seed(seed)
    rounding, rows = 1e-3, 200
    logits = (3 * torch.randn(rows, 50, generator=generator)).mul(20).round().div(20)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options, positions = Options.of([params] * rows, [seed] * rows, "cpu"), torch.arange(rows)
    tokens, sure = sample_surely(logits, options, positions, None, None, rounding)
    assert tokens.equal(sample_ids(logits, options, positions))
    assert sure.float().mean() > 0.3
    for _ in range(5):
        noise = (2 * torch.rand(logits.shape, generator=generator) - 1) * logits.abs().amax(-1, keepdim=True)
        moved = sample_ids(logits + 0.999 * rounding * noise, options, positions)
        assert moved[sure].equal(tokens[sure])


def test_several_texts_are_decoded_by_steps(model, tokenizer, passes):
    params = [SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, prompt_lookup=16)] * 3
    together = results(model, tokenizer, ["The", "a", "fox"], params)
    assert not passes
    for index, prompt in enumerate(["The", "a", "fox"]):
        assert together[index, 0].tokens == one(model, tokenizer, prompt, params[index]).tokens


def test_a_row_speeds_up_once_it_is_alone(model, tokenizer, passes):
    biased = {"temperature": 0.0, "ignore_eos": True, "logit_bias": ((50, 100.0),), "prompt_lookup": 16}
    params = [SamplingParams(max_tokens=20, **biased), SamplingParams(max_tokens=90, **biased)]
    both = results(model, tokenizer, ["The", "a"], params)
    assert [both[index, 0].tokens for index in (0, 1)] == [[50] * 20, [50] * 90]
    assert [count for count, _ in passes] == [17] * 4


@pytest.mark.parametrize("form", KINDS, ids=["linear", "softmax", "hybrid"])
def test_the_engine_gives_what_generate_gives(form, tokenizer, passes):
    """One alone, then several that join and leave."""
    ready = make_ready(small_model(**form), tokenizer)
    biased = {"temperature": 0.0, "ignore_eos": True, "logit_bias": ((50, 100.0),), "prompt_lookup": 16}
    with Engine(ready, num_slots=3) as engine:
        ids = ready.encode("The quick brown fox")
        [alone] = [
            event for event in engine.submit(ids, ready.params(max_tokens=70, **biased)) if hasattr(event, "seed")
        ]
        assert alone.tokens == [50] * 70 and passes
        tickets = [engine.submit(ids, ready.params(max_tokens=30 + 9 * row, seed=row)) for row in range(5)]
        for row, ticket in enumerate(tickets):
            [result] = [event for event in ticket if hasattr(event, "seed")]
            assert (
                result.tokens
                == one(ready.model, tokenizer, ids, ready.params(max_tokens=30 + 9 * row, seed=row)).tokens
            )


def test_a_state_saved_after_passes_is_continued(tmp_path, model, tokenizer, passes):
    params = {"temperature": 0.0, "ignore_eos": True, "logit_bias": ((50, 100.0),), "prompt_lookup": 16}
    whole = one(model, tokenizer, "The", SamplingParams(max_tokens=60, **params), keep_contexts=True)
    assert passes
    weights = weights_hash(model)
    save_context(tmp_path / "x.state", whole.context, weights)
    context = load_context(tmp_path / "x.state", model, weights)
    more = one(model, tokenizer, [], SamplingParams(max_tokens=9, **params), contexts=[context])
    assert more.tokens == [50] * 9


def test_a_conversation_is_searched(model, tokenizer, monkeypatch):
    ready, seen = make_ready(model, tokenizer), []
    monkeypatch.setattr(
        "tnllm.generation.samples.Lookup", lambda ids, count: seen.append(list(ids)) or Lookup(ids, count)
    )
    talk = Conversation(ready, ready.params(max_tokens=4, seed=1, prompt_lookup=8), ready.chat_template)
    for question in "The quick", "brown fox":
        list(talk.ask(question))
    assert tokenizer.decode(seen[0]) in tokenizer.decode(seen[1])
    assert "The quick" in tokenizer.decode(seen[1]) and "brown fox" in tokenizer.decode(seen[1])


def test_what_is_proposed():
    lookup = Lookup([*range(3, 30), *range(3, 3 + MIN_MATCH - 1)], 4)
    assert lookup.propose() == [], "no match is long enough"
    last = 3 + MIN_MATCH - 1
    lookup.push(last)
    assert lookup.propose() == [last + 1, last + 2, last + 3, last + 4]
    lookup.verified(0)
    assert lookup.propose() == [], "twice the evidence is asked"
    for token in range(last + 1, last + 1 + MIN_MATCH):
        assert lookup.propose() == []
        lookup.push(token)
    assert lookup.propose() != []
    lookup.verified(4)
    lookup.push(999)
    assert lookup.propose() == []


def test_a_short_period_fills_a_proposal():
    assert Lookup([5, 6, 7] * 6, 7).propose() == [5, 6, 7, 5, 6, 7, 5]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_a_proposal_continues_an_earlier_passage(ids, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup_module, "MIN_MATCH", 3)
        lookup = Lookup(ids, count)
        lookup._asked = 3
        proposal = lookup.propose()
    runs = [ids[end - 3 : end] for end in range(3, len(ids))]
    assert bool(proposal) == (ids[-3:] in runs and len(ids) > 3)
    if proposal:
        whole = ids + proposal
        assert len(proposal) == count and any(
            ids[end - 3 : end] == ids[-3:] and whole[end : end + count] == proposal for end in range(3, len(ids))
        )


def test_models_that_gain_nothing_refuse(tokenizer, monkeypatch):
    model = small_model()
    model.quantize_int8()
    with pytest.raises(UserError, match="prompt_lookup gains nothing with int8 weights"):
        generate(model, tokenizer, ["a"], SamplingParams(prompt_lookup=8))
    monkeypatch.setattr(slots, "can_capture", lambda *_: True)
    with pytest.raises(UserError, match="prompt_lookup gains nothing with a model whose steps are CUDA graphs"):
        generate(small_model(), tokenizer, ["a"], SamplingParams(prompt_lookup=8))
    with pytest.raises(UserError, match="prompt_lookup is 65; allowed: a whole number, 0 to 64"):
        SamplingParams(prompt_lookup=65)


def test_damaged_weights_are_named_in_a_pass(tokenizer, monkeypatch):
    model = small_model()
    params = {
        "max_tokens": 60,
        "temperature": 0.0,
        "ignore_eos": True,
        "logit_bias": ((50, 100.0),),
        "prompt_lookup": 16,
    }
    chunk = Slots._verify

    def damaged(self, *args):
        model.layers[1].channel_mixer.l3.weight[0, 0] = math.nan
        return chunk(self, *args)

    monkeypatch.setattr(Slots, "_verify", damaged)
    with pytest.raises(Exception, match="non-finite logits near token"):
        one(model, tokenizer, "The", SamplingParams(**params))
