"""Shared by the tests of commands."""

import io
import sys
from collections.abc import Callable

import pytest
import torch

from tnllm.cli.main import main
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import save_model
from tnllm.tokenizer import train_tokenizer


@pytest.fixture
def tnllm(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        return (end.value.code, *capsys.readouterr())

    return run


TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "今天天气很好，我们去公园。\n"] * 20


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory):
    """A small untrained model with spread logits, and its tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, 340))
    sizes = {"vocab_size": 352, "model_dim": 64, "num_heads": 2, "num_layers": 2, "glu_dim": 96}
    model = build_model(get_preset("tiny", **sizes, tie_embeddings=False), seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    save_model(model, folder / "weights", folder / "tokenizer.model")
    return folder / "weights"


@pytest.fixture
def run_generate(small_weights, capsys, monkeypatch):
    """Run `tnllm generate` with the small model; returns exit code, stdout, stderr."""

    def outcome(*args, stdin=b"", model=True, terminal=False):
        stream = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stream)
        given = ["--model", str(small_weights)] if model else []
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *given, *map(str, args)])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return outcome
