"""`convert --to onnx`: the graph computes what the model computes, for every variant, at any position, batch and length."""

import re

import numpy as np
import onnx
import pytest
import torch

from tests.small_models import small_model
from tnllm.convert.onnx import MODEL, Session
from tnllm.errors import CheckFailed, UserError
from tnllm.modeling.weights import load_model, save_model
from tnllm.tokenizer import train_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "今天天气很好，我们去公园。\n"] * 20
VARIANTS = [
    {},
    {
        "position": "decay",
        "norm": "layernorm",
        "activation": "1+elu",
        "glu_activation": "silu",
        "tie_embeddings": False,
    },
    {"position": "ape", "norm": "rmsnorm", "gate": "none", "num_heads": 1, "max_position": 64},
    {"softmax_every": 2, "qk_norm": True, "rope_base": 500.0},
]


@pytest.fixture
def weights(tmp_path):
    """Save a small model; returns its folder."""

    def save(**choices):
        (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, 340))
        save_model(small_model(**{"num_layers": 2, **choices}), tmp_path / "weights", tmp_path / "tokenizer.model")
        return tmp_path / "weights"

    return save


@pytest.mark.slow
@pytest.mark.parametrize("choices", VARIANTS, ids=["released", "decay", "ape", "hybrid"])
def test_the_graph_is_the_model(choices, weights, run, tmp_path):
    folder = weights(**choices)
    report = run(folder, tmp_path / "graph", "onnx")
    assert report.share < 1e-5
    graph = onnx.load(tmp_path / "graph" / MODEL)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert b"modeling_tnllm.py" not in (tmp_path / "graph" / MODEL).read_bytes()
    model = load_model(folder, dtype=torch.float64)
    for batch, lengths in ((1, (1, 1, 5)), (3, (17, 1, 2))):
        session, state = Session(tmp_path / "graph" / MODEL, batch), None
        for length in lengths:
            tokens = torch.randint(0, model.config.vocab_size, (batch, length))
            expected, state = model(tokens, state)
            np.testing.assert_allclose(session(tokens.numpy()), expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_int8_is_close_and_smaller(weights, run, tmp_path):
    folder = weights(num_layers=1)
    said: list[str] = []
    report = run(folder, tmp_path / "graph", "onnx", said, quantize="int8")
    weights_of = onnx.load(tmp_path / "graph" / MODEL).graph.initializer
    small = sum(int(np.prod(item.dims)) for item in weights_of if item.data_type == onnx.TensorProto.INT8)
    embedding = report.source.config.vocab_size * report.source.config.model_dim
    assert small >= report.source.num_parameters - embedding
    assert 1e-5 < report.share < 0.4
    [line] = [line for line in said if line.startswith("int8")]
    before, after = map(float, re.findall(r"\d+\.\d+", line))
    assert abs(after - before) < 0.02 * before


def test_what_a_graph_cannot_hold(weights, run, tmp_path):
    with pytest.raises(UserError, match=r"a graph .* is for TransNormerLLM"):
        run(weights(kind="transformer"), tmp_path / "graph", "onnx")
    with pytest.raises(UserError, match=r"a graph .* holds float32"):
        run(weights(), tmp_path / "graph", "onnx", dtype=torch.bfloat16)
    assert not (tmp_path / "graph").exists() or not list((tmp_path / "graph").glob("*.onnx"))


@pytest.mark.slow
def test_a_wrong_graph_is_thrown_away(weights, run, tmp_path, monkeypatch):
    monkeypatch.setattr("tnllm.convert.onnx._one_chunk", lambda q, k, v, log_decay, state, rows: (v, state * 1.0))
    with pytest.raises(CheckFailed, match="nothing was kept"):
        run(weights(), tmp_path / "graph", "onnx")
    assert not list(tmp_path.glob("graph/*.onnx"))
