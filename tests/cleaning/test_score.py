import math

import pytest
import torch
import torch.nn.functional as F

from tests.cleaning.texts import CHINESE, ENGLISH
from tests.small_models import small_model
from tnllm import assets
from tnllm.cleaning.score import Score, score_texts
from tnllm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def scorer():
    tokenizer = Tokenizer.load(assets.tokenizer_model())
    return small_model(vocab_size=tokenizer.vocab_size).double(), tokenizer


def plain(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text, eos=True)])
    logits, _ = model(ids)
    return float(F.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum"))


TEXTS = [ENGLISH, "a", CHINESE, "", ENGLISH[:200], "短"]


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_score_is_the_plain_loss_whatever_the_chunks(scorer, chunk):
    """Float64 sums in another order: 1e-9 of a nat is far above their rounding."""
    model, tokenizer = scorer
    scores = list(score_texts(model, tokenizer, TEXTS, chunk))
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer.encode(text, eos=True)
        assert score.tokens == len(ids) - 1
        # The logits come back in fp32 at most from the model, so the sum is good to 1e-6 of itself.
        assert score.nats == pytest.approx(plain(model, tokenizer, text) if score.tokens else 0.0, rel=1e-6, abs=1e-9)
        first = len(tokenizer.token_bytes[ids[0]])
        assert score.num_bytes == max(0, len(text.encode()) - first)


def test_bits_and_perplexity():
    score = Score(tokens=10, nats=10 * math.log(8), num_bytes=15)
    assert score.bits_per_byte == pytest.approx(2) and score.perplexity == pytest.approx(8)
    assert Score(0, 0.0, 0).bits_per_byte == 0 and Score(1, 1e4, 1).perplexity == math.inf


def test_documents_do_not_see_each_other(scorer):
    model, tokenizer = scorer
    alone = [next(iter(score_texts(model, tokenizer, [text]))).nats for text in TEXTS]
    together = [score.nats for score in score_texts(model, tokenizer, TEXTS)]
    assert together == pytest.approx(alone, rel=1e-6)
