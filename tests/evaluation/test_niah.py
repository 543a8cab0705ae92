"""A needle in a haystack: prompts of the length asked for, the needle where it should be, and scores checked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm import assets
from tnllm.errors import UserError
from tnllm.evaluation.niah import OTHERS, niah, prompts, split_sentences
from tnllm.generation.loading import load
from tnllm.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(assets.tokenizer_model())


def made(length, depths, samples=2, seed=0):
    return list(prompts(TOKENIZER, 1, [length], depths, samples, seed))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(128, 3000), seed=st.integers(0, 99))
def test_prompts_fill_the_length_and_never_exceed_it(length, seed):
    for prompt in made(length, [0, 50, 100], 1, seed):
        assert length - 40 < len(prompt.context) <= length


def test_the_needle_stands_where_it_should():
    first, middle, last = (made(1000, [depth], 1)[0] for depth in (0, 50, 100))
    number = TOKENIZER.decode(first.answers[0]).strip()
    shares = []
    for prompt in (first, middle, last):
        text = TOKENIZER.decode(prompt.context)
        assert text.count(number) == 1 and text.rstrip().endswith("is")
        shares.append(text.index(number) / len(text))
    assert shares[0] < 0.05 < 0.45 < shares[1] < 0.52 and shares[2] > 0.9
    # Depths differ in the place alone.
    assert sorted(first.context) == sorted(middle.context) == sorted(last.context)


def test_prompts_repeat_and_samples_differ():
    assert made(300, [50]) == made(300, [50])
    one, two = made(300, [50])
    assert one.context != two.context and made(300, [50], seed=1)[0] != one
    assert len({tuple(answer) for answer in one.answers}) == 1 + OTHERS


def test_scores_are_those_of_one_prompt_after_the_other(folder):
    loaded = load(str(folder), "cpu")
    rows = niah(loaded, [160], [0, 100], samples=2, batch_tokens=64)
    for row in rows:
        exact, chosen, nats = 0, 0, []
        for prompt in prompts(loaded.tokenizer, loaded.bos_id, [160], [row["depth"]], 2, 0):
            sums = []
            for index, answer in enumerate(prompt.answers):
                ids = torch.tensor([prompt.context + answer])
                logits = loaded.model(ids)[0][0, len(prompt.context) - 1 : -1].double().log_softmax(-1)
                found = logits[torch.arange(len(answer)), torch.tensor(answer)]
                sums.append(float(found.sum()))
                if index == 0:
                    nats.append(-float(found.mean()))
                    exact += bool((logits.argmax(-1) == torch.tensor(answer)).all())
            chosen += np.argmax(sums) == 0
        assert (row["exact"], row["chosen"]) == (exact / 2, chosen / 2)
        assert row["nats"] == pytest.approx(np.mean(nats), abs=1e-4)


def test_a_model_that_copies_finds_every_needle(folder, monkeypatch):
    """Probabilities of a model that always continues as the text did: both shares are one."""
    loaded = load(str(folder), "cpu")

    class Copies:
        def __init__(self, model, batch_tokens=None):
            pass

        def score(self, requests, report):
            from tnllm.generation.scoring import Score

            for index, request in enumerate(requests):
                text = TOKENIZER.decode(list(request.context))
                there = TOKENIZER.decode(list(request.continuation)).strip() in text
                yield Score(index, np.full(len(request.continuation), -0.1 if there else -9.0), there)

    monkeypatch.setattr("tnllm.evaluation.niah.Scorer", Copies)
    assert [(row["exact"], row["chosen"]) for row in niah(loaded, [400], [0, 30, 100], samples=3)] == [(1, 1)] * 3


def test_sentences_of_ones_own():
    assert split_sentences("Too short. This one is long enough to be kept.\n\nAnd so is this one here, the last") == [
        "This one is long enough to be kept.", "And so is this one here, the last",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no sentence"):
        split_sentences("a. b.")
