"""Log-probabilities are those of the model read from the start, however they are shared, packed and cut."""

import numpy as np
import pytest
import torch

from tests.small_models import KINDS, make_ready, small_model
from tnllm.cleaning.score import score_texts
from tnllm.errors import RunError, UserError
from tnllm.evaluation.perplexity import perplexity
from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Scorer
from tnllm.serving.engine import Engine
from tnllm.tokenizer import bits_per_byte


def make_requests(seed=0, vocab_size=352):
    random = np.random.default_rng(seed)
    ids = lambda count: random.integers(0, vocab_size, count).tolist()  # noqa: E731
    requests = []
    for header in (ids(70), ids(45)):
        for _ in range(3):
            stem = ids(int(random.integers(1, 40)))
            requests += [Request([*header, *stem], ids(int(random.integers(1, 6)))) for _ in range(4)]
    return [*requests, Request(ids(1), ids(1)), requests[0]]


def directly(model, request):
    """The definition: one forward pass over the whole text."""
    whole = torch.tensor([[*request.context, *request.continuation]])
    logits = model(whole[:, :-1])[0][0, len(request.context) - 1 :]
    logprobs = logits.log_softmax(-1).gather(-1, whole[0, len(request.context) :, None])[:, 0]
    return logprobs.numpy(), logits.argmax(-1).tolist() == request.continuation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("tokens", "rows"), [(4096, None), (64, None), (17, 2), (4096, 1)])
def test_equals_the_definition_in_float64(kind, share, tokens, rows):
    model, requests = small_model(torch.float64, **kind), make_requests()
    scorer = Scorer(model, share, tokens, rows)
    scores = {score.index: score for score in scorer.score(requests)}
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        logprobs, greedy = directly(model, request)
        np.testing.assert_allclose(scores[index].logprobs, logprobs, atol=1e-9)
        assert scores[index].greedy == greedy
    assert scorer.plain_tokens >= scorer.num_tokens
    assert (scorer.num_tokens < 0.6 * scorer.plain_tokens) == share


def test_shared_equals_plain_in_float32():
    model, requests = small_model(), make_requests()
    ways = [{s.index: s.logprobs.sum() for s in Scorer(model, share).score(requests)} for share in (True, False)]
    # Logits of about N(0, 3^2): the tolerance of prefill in any chunks, times the tokens of a continuation.
    assert max(abs(ways[0][index] - ways[1][index]) for index in ways[0]) < 5e-4


def test_a_greedy_continuation_is_told():
    model = small_model()
    context = [5, 6, 7]
    best = int(model(torch.tensor([context]))[0][0, -1].argmax())
    scores = {s.index: s for s in Scorer(model).score([Request(context, [best]), Request(context, [(best + 1) % 352])])}
    assert scores[0].greedy and not scores[1].greedy


def test_a_long_text_is_scored_whole_in_small_passes():
    model = small_model(torch.float64)
    text = np.random.default_rng(1).integers(0, 352, 700).tolist()
    [whole] = Scorer(model, batch_tokens=4096).score([Request([1], text)])
    [parts] = Scorer(model, batch_tokens=64).score([Request([1], text)])
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-9)


def test_out_of_memory_goes_on_with_smaller_passes(monkeypatch):
    model, requests, notes = small_model(torch.float64), make_requests(), []
    expected = {s.index: s.logprobs for s in Scorer(model).score(requests)}
    hidden = type(model).hidden

    def scarce(self, tokens, *rest):
        if tokens.shape[1] > 100:
            raise torch.OutOfMemoryError("no room")
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(type(model), "hidden", scarce)
    scores = {s.index: s.logprobs for s in Scorer(model, log=notes.append).score(requests)}
    assert all(np.allclose(scores[index], expected[index], atol=1e-9) for index in expected)
    assert notes and notes[0].startswith("out of GPU memory: continuing with")
    with pytest.raises(RunError, match="a piece of 150 tokens does not fit"):
        list(Scorer(model).score([Request([1] * 150, [1])]))


def test_ids_and_results_out_of_range_are_told():
    with pytest.raises(UserError, match="vocabulary of 352"):
        list(Scorer(small_model()).score([Request([400], [1])]))
    model = small_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="non-finite"):
        list(Scorer(model).score([Request([1], [1])]))


def test_evaluation_data_score_perplexity_and_the_server_give_one_number(tokenizer):
    """The same text after the same token. Float64 leaves only the order of sums."""
    model, text = small_model(torch.float64), "The quick brown fox jumps over the lazy dog."
    ready = make_ready(model, tokenizer)
    ids = tokenizer.encode(text)
    [score] = Scorer(model).score([Request([ready.bos_id], ids)])
    with Engine(ready, num_slots=2) as engine:
        params = ready.params(max_tokens=0, logprobs=2)
        read = next(iter(engine.submit([ready.bos_id, *ids], params, prompt_logprobs=2)))
    # The server gives the vocabulary's padding no probability, which raises all others alike.
    logits = model(torch.tensor([[ready.bos_id, *ids[:-1]]]))[0][0]
    padding = logits.logsumexp(-1) - logits[:, : tokenizer.vocab_size].logsumexp(-1)
    np.testing.assert_allclose(
        [entry.logprob for entry in read.logprobs[1:]], score.logprobs + padding.numpy(), atol=1e-5
    )
    assert read.logprobs[0] is None and all(len(entry.top) == 2 for entry in read.logprobs[1:])
    bits = perplexity(ready, [text])["bits_per_byte"]
    assert bits == pytest.approx(bits_per_byte(-score.logprobs.sum(), len(text)))
    [document] = score_texts(model, tokenizer, [text])
    [alone] = Scorer(model).score([Request(ids[:1], [*ids[1:], tokenizer.eos_id])])
    assert document.nats == pytest.approx(-alone.logprobs.sum()) and document.tokens == len(ids)
