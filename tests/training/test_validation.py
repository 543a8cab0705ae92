"""A validation loss does not depend on how its rows are read."""

import pytest
import torch

from tests.training.sections import loaders_of, tokenizer_of
from tnllm.data.encode import Options
from tnllm.data.loader import IGNORE
from tnllm.data.tokenize import tokenize_corpus
from tnllm.errors import UserError
from tnllm.parallel.ranks import SingleProcess
from tnllm.training import loaders
from tnllm.training.config import load_recipe
from tnllm.training.dry_run import check_recipe
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
    _, loader = loaders_of(config)
    expected = validate(loss_sum, loader, 1, max_tokens)
    assert loader.num_rows > 5 and expected[0] > 0
    for rows in (2, 3, 4, 7, 1000):
        assert validate(loss_sum, loader, rows, max_tokens) == expected
        sums: list = []
        assert [validate(loss_sum, loader, rows, max_tokens, Recorded(r, 3, sums)) for r in range(3)][-1] == expected


def test_every_batch_has_one_shape(recipe):
    config = load_recipe(str(recipe))
    _, loader = loaders_of(config)
    shapes = set()

    def shape(batch):
        shapes.add((batch.tokens.shape, batch.labels.shape, batch.cu_seqlens.shape))
        return torch.zeros(())

    validate(shape, loader, 4, None)
    assert len(shapes) == 1


def test_a_validation_text_of_its_own(recipe, tmp_path):
    """It is validated on whole, nothing of the training text is held out, and shards are as good as text."""
    (tmp_path / "val.txt").write_text("The tide turned at noon, and the boats came home.\n" * 40)
    plain = load_recipe(str(recipe), ["data.val_fraction=0"])
    config = load_recipe(str(recipe), [f"data.val_path={tmp_path / 'val.txt'}"])
    tokenizer = tokenizer_of(config)
    (train, text), (expected, nothing) = loaders_of(config), loaders_of(plain)
    assert nothing is None
    assert train.sources[0].stream.num_tokens == expected.sources[0].stream.num_tokens
    assert text.sources[0].stream.num_tokens == len(tokenizer.encode((tmp_path / "val.txt").read_text())) + 1

    tokenize_corpus([tmp_path / "val.txt"], tmp_path / "shards", tokenizer, Options(val_fraction=0.5), workers=1)
    config = load_recipe(str(recipe), [f"data.val_path={tmp_path / 'shards'}"])
    _, split = loaders_of(config)
    assert len(split.sources) == 2
    assert sum(source.stream.num_tokens for source in split.sources) == text.sources[0].stream.num_tokens


def test_the_training_text_is_no_validation_text(recipe, tmp_path):
    corpus = load_recipe(str(recipe)).data.path[0].path
    with pytest.raises(UserError, match=r"is in path and in val_path; validate on text that is not trained on"):
        load_recipe(str(recipe), [f"data.val_path={corpus}"])
    with pytest.raises(UserError, match=r"data.val_path is .*absent.txt: no such file or folder"):
        check_recipe(str(recipe), [f"data.val_path={tmp_path / 'absent.txt'}"])


def test_the_text_to_validate_on_is_looked_for_before_any_is_tokenized(recipe, monkeypatch):
    config = load_recipe(str(recipe), ["data.val_path=Sample"])
    monkeypatch.setattr(loaders, "prepare", lambda *args, **options: pytest.fail("tokenized first"))
    with pytest.raises(UserError, match=r"no such file or folder: Sample .* called sample and dirty-sample"):
        loaders.open_loaders(config.data, tokenizer_of(config), rows=2, seed=0)
