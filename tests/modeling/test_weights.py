"""Weights folders: written completely or not at all, read back exactly, damaged ones named."""

import json

import pytest
import torch

from tnllm.errors import RunError, UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import load_model, resolve_model, save_model

CONFIG = get_preset("tiny", vocab_size=97, model_dim=32, num_heads=2, num_layers=2, glu_dim=48)


@pytest.fixture
def model():
    return build_model(CONFIG, seed=0)


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_round_trip(tmp_path, model, shard_bytes):
    tokenizer = tmp_path / "any.model"
    tokenizer.write_bytes(b"pieces")
    save_model(model, tmp_path / "w", tokenizer=tokenizer, shard_bytes=shard_bytes)
    assert (tmp_path / "w/model.safetensors.index.json").exists() == (shard_bytes == 5000)
    assert (tmp_path / "w/tokenizer.model").read_bytes() == b"pieces"
    loaded = load_model(tmp_path / "w")
    assert loaded.config == CONFIG
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["any.model", "w"]


def test_bfloat16_file_keeps_theta_in_fp32(tmp_path, model):
    save_model(model, tmp_path / "w", dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "w")
    assert loaded.embed_tokens.weight.dtype == torch.bfloat16
    theta = "layers.0.token_mixer.lrpe.theta"
    assert torch.equal(loaded.state_dict()[theta], model.state_dict()[theta])
    assert load_model(tmp_path / "w", dtype=torch.float32).embed_tokens.weight.dtype == torch.float32


def test_a_run_folder_stands_for_its_weights(tmp_path, model):
    save_model(model, tmp_path / "run" / "weights")
    assert resolve_model(tmp_path / "run") == tmp_path / "run" / "weights"


def damage(folder, how):
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "missing":
        file.unlink()
    elif how == "config":
        values = json.loads((folder / "config.json").read_text())
        values["model"]["num_layers"] += 1
        (folder / "config.json").write_text(json.dumps(values))
    elif how == "shape":
        values = json.loads((folder / "config.json").read_text())
        values["model"]["glu_dim"] += 1
        (folder / "config.json").write_text(json.dumps(values))
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "other":
        (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("truncated", RunError, "model.safetensors is damaged"),
        ("missing", UserError, "model.safetensors is missing"),
        ("config", RunError, "lacks 5 tensors, first 'layers.2"),
        ("shape", RunError, r"config.json says \[49, 32\]"),
        ("json", UserError, "config.json is not JSON"),
        ("other", UserError, "is not a tnllm config"),
    ],
)
def test_damaged_folders_are_named(tmp_path, model, how, error, message):
    save_model(model, tmp_path / "w")
    damage(tmp_path / "w", how)
    with pytest.raises(error, match=message) as caught:
        load_model(tmp_path / "w")
    assert "\n" not in str(caught.value)


def test_an_index_cannot_point_elsewhere(tmp_path, model):
    save_model(model, tmp_path / "w", shard_bytes=5000)
    index = tmp_path / "w/model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="must lie in the same folder"):
        load_model(tmp_path / "w")


def test_no_model_there(tmp_path):
    with pytest.raises(UserError, match="is not a folder; give a run folder, a weights folder or hf://ORG/NAME"):
        resolve_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds neither"):
        resolve_model(tmp_path)


def test_a_failed_save_leaves_the_old_folder(tmp_path, model, monkeypatch):
    save_model(model, tmp_path / "w")
    before = (tmp_path / "w/model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tnllm.modeling.weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path / "w")
    assert (tmp_path / "w/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
