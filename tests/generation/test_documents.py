"""Documents of any length: the same numbers however they are cut, and only a part of them is read ahead."""

import numpy as np
import pytest
import torch

from tests.small_models import small_model
from tnllm.errors import UserError
from tnllm.generation.documents import last_batch, score_documents
from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Scorer

LENGTHS = [5, 1, 300, 2, 0, 64, 63, 65, 7, 129]


@pytest.fixture(scope="module")
def model():
    return small_model(torch.float64)


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, 352, length).tolist() for length in LENGTHS]


def cut(ids: list[int], size: int):
    return (ids[start : start + size] for start in range(0, len(ids), size))


@pytest.mark.parametrize("batch_tokens", [7, 64, 4096])
@pytest.mark.parametrize("size", [3, 50, 1000])
def test_numbers_do_not_depend_on_how_documents_are_cut(model, documents, batch_tokens, size):
    """Float64 leaves the order of sums: 1e-9 is far above it."""
    scorer = Scorer(model, batch_tokens=batch_tokens)
    parts = list(score_documents(scorer, (cut(ids, size) for ids in documents)))
    assert sorted(part.document for part in parts) == [part.document for part in parts]
    for number, ids in enumerate(documents):
        mine = [part for part in parts if part.document == number]
        assert [part.start for part in mine] == np.cumsum([0, *(len(part.ids) for part in mine[:-1])]).tolist()
        assert np.concatenate([part.ids for part in mine]).tolist() == ids[1:]
        expected = next(Scorer(model).score([Request(ids[:1], ids[1:])])).logprobs if len(ids) > 1 else np.zeros(0)
        np.testing.assert_allclose(np.concatenate([part.logprobs for part in mine]), expected, atol=1e-9)


def test_a_long_document_is_read_as_it_is_scored(model):
    read = 0

    def document():
        nonlocal read
        for read in range(1, 21):
            yield [read] * 100

    for part in score_documents(Scorer(model, batch_tokens=100), [document()]):
        # The part that is scored, and the next one at most.
        assert part.start + len(part.ids) >= (read - 2) * 100
    assert read == 20


@pytest.mark.parametrize("batch_tokens", [64, 128])
def test_the_last_batch_begins_where_scoring_begins_one(model, documents, batch_tokens):
    """Scoring what a stopped call left computes the same documents together: the numbers are equal, not only close."""
    scorer = Scorer(model, batch_tokens=batch_tokens)
    whole = list(score_documents(scorer, ([ids] for ids in documents)))
    for stopped in range(len(documents)):
        first = last_batch(LENGTHS[:stopped], batch_tokens)
        assert first <= stopped
        rest = list(score_documents(scorer, ([ids] for ids in documents[first:])))
        again = [part for part in whole if part.document >= first]
        assert [part.logprobs.tolist() for part in rest] == [part.logprobs.tolist() for part in again]


@pytest.mark.parametrize("ids", [[1, 400], [400, 1], [1] * 200 + [400]])
def test_an_id_that_the_model_has_not_is_refused(model, ids):
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        list(score_documents(Scorer(model, batch_tokens=64), [[ids]]))
