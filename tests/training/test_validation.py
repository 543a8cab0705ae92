"""A validation loss does not depend on how its rows are read."""

import pytest
import torch

from tnllm.data.loader import IGNORE
from tnllm.parallel.ranks import SingleProcess
from tnllm.training.config import load_recipe
from tnllm.training.loaders import open_loaders, open_tokenizer
from tnllm.training.validation import validate


class Recorded(SingleProcess):
    """One of several ranks that are asked in turn; the last one sums what all of them counted."""

    def __init__(self, rank, size, sums):
        self.data_rank, self.data_size, self.sums = rank, size, sums

    def sum_counts(self, loss, labels, num_bytes):
        self.sums.append((loss, labels, num_bytes))
        return tuple(map(sum, zip(*self.sums, strict=True)))


def loss_sum(batch):
    """Whole numbers, so that sums are exact in any order."""
    return (batch.labels[batch.labels != IGNORE] % 7).sum()


@pytest.mark.parametrize("packing", ["reset", "concat"])
@pytest.mark.parametrize("max_tokens", [None, 32, 160, 1000])
def test_micro_batch_and_ranks_change_nothing(recipe, packing, max_tokens):
    config = load_recipe(str(recipe), [f"data.packing={packing}"])
    _, loader = open_loaders(config, open_tokenizer(config))
    expected = validate(loss_sum, loader, 1, max_tokens)
    assert loader.num_rows > 5 and expected[0] > 0
    for rows in (2, 3, 4, 7, 1000):
        assert validate(loss_sum, loader, rows, max_tokens) == expected
        sums: list = []
        assert [validate(loss_sum, loader, rows, max_tokens, Recorded(r, 3, sums)) for r in range(3)][-1] == expected


def test_every_batch_has_one_shape(recipe):
    config = load_recipe(str(recipe))
    _, loader = open_loaders(config, open_tokenizer(config))
    shapes = set()

    def shape(batch):
        shapes.add((batch.tokens.shape, batch.labels.shape, batch.cu_seqlens.shape))
        return torch.zeros(())

    validate(shape, loader, 4, None)
    assert len(shapes) == 1
