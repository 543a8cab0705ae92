"""A tokenizer with few tokens and a model that goes with it."""

import pytest

from tests.small_models import small_model
from tnllm.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog and the cat.\n", "今天天气很好，我们去公园。\n"] * 20


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, 340))
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def model():
    return small_model()
