"""A small corpus, tokenizer and run config that every training test shares."""

import json
import random
from pathlib import Path

import pytest

from tnllm.tokenizer import train_tokenizer
from tnllm.training.config import RunConfig, load_recipe

RECIPE = """
model: {preset: tiny, vocab_size: 320, model_dim: 32, num_heads: 2, num_layers: 2, glu_dim: 48}
tokenizer: {path: TOKENIZER}
data: {path: CORPUS, seq_len: 32, val_fraction: 0.1}
optimizer: {learning_rate: 1e-2}
schedule: {warmup_steps: 2, horizon_steps: 20}
train: {max_steps: 20, global_batch_tokens: 256, micro_batch_size: 4, device: cpu}
eval: {every_steps: 10, tokens: 1K}
log: {every_steps: 1}
checkpoint: {every_steps: 5, keep: 2, async_save: false}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> tuple[Path, Path]:
    """A text file of a hundred documents with some structure to learn, and a tokenizer of 320 pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    sentence = "the quick brown fox jumps over a lazy dog while seven wizards box near old quiet jetty"
    words = sentence.split(" ")
    draw = random.Random(0)
    lines = []
    for _ in range(100):
        start = draw.randrange(len(words))
        lines.append(" ".join(words[(start + i * 3) % len(words)] for i in range(draw.randrange(20, 60))))
    text = folder / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(lines, vocab_size=320))
    return text, model


@pytest.fixture
def recipe(corpus, tmp_path, monkeypatch) -> Path:
    """A recipe file for that corpus; the token cache goes to the test's own folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("CORPUS", str(corpus[0])).replace("TOKENIZER", str(corpus[1])))
    return path


@pytest.fixture
def config(recipe) -> RunConfig:
    return load_recipe(str(recipe))
