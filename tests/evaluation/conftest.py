"""A weights folder with a small random model and its tokenizer; the harness kept quiet and off the network."""

import os

import pytest

os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

from tests.small_models import small_model
from tnllm import assets
from tnllm.modeling.weights import save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two layers over the packaged tokenizer's 8,192 pieces."""
    path = tmp_path_factory.mktemp("model") / "small"
    save_model(small_model(vocab_size=8192, num_layers=2), path, assets.tokenizer_model())
    return path
