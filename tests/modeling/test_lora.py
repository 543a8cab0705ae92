"""Adapters: nothing changes at first, only they are trained, merged equals beside, and PEFT's files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnllm.errors import RunError, UserError
from tnllm.modeling import load_model
from tnllm.modeling.config import LoraConfig, get_preset
from tnllm.modeling.flops import lora_parameters
from tnllm.modeling.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_lora,
    lora_layers,
    merge_adapter,
    merge_lora,
    save_adapter,
)
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import save_model

SMALL = {"vocab_size": 64, "model_dim": 32, "num_heads": 2, "glu_dim": 48, "num_layers": 2}
TOKENS = torch.arange(40)[None] % 64


def build(**choices):
    return build_model(get_preset("tiny", **SMALL, **choices), seed=0)


def trained():
    """A model whose adapters are not zero."""
    model = build()
    add_lora(model, LoraConfig(rank=4, alpha=6.0), seed=1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    return model


@pytest.mark.parametrize(
    "choices", [{}, {"gate": "low-rank", "gate_dim": 4}, {"kind": "transformer"}, {"softmax_every": 2}], ids=str
)
def test_nothing_changes_at_first_and_only_adapters_learn(choices):
    model = build(**choices)
    before, _ = model(TOKENS)
    add_lora(model, LoraConfig(rank=4))
    assert torch.equal(model(TOKENS)[0], before)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fused = (
        ["qkvu_proj"] if choices == {} else ["qkvu_proj", "qkv_proj"] if "softmax_every" in choices else ["qkv_proj"]
    )
    assert {name.split(".", 3)[3] for name in learned} == {
        f"{part}.lora_{matrix}.weight" for part in (*fused, "out_proj", "l1", "l2", "l3") for matrix in "AB"
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora_parameters(
        model.config, LoraConfig(rank=4)
    )
    model.loss(TOKENS, TOKENS).backward()
    for layer in lora_layers(model).values():
        assert layer.weight.grad is None and layer.lora_B.weight.grad.abs().max() > 0


def test_merged_equals_beside():
    model = trained()
    beside, state = model(TOKENS)
    step = model.step(TOKENS[:, 0], state)
    merge_lora(model)
    assert model.lora is None and not lora_layers(model)
    merged, state = model(TOKENS)
    # fp32 sums in another order.
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.step(TOKENS[:, 0], state), step, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(build().state_dict())


def test_a_base_in_bf16_runs_outside_of_autocast():
    """So text is sampled while an adapter is trained on a GPU."""
    model, exact = build().bfloat16(), trained()
    add_lora(model, LoraConfig(rank=4, alpha=6.0))
    model.load_state_dict(exact.state_dict())
    logits, state = model(TOKENS)
    assert {layer.lora_A.weight.dtype for layer in lora_layers(model).values()} == {torch.float32}
    torch.testing.assert_close(logits, exact(TOKENS)[0], rtol=0.1, atol=0.05)
    assert model.step(TOKENS[:, 0], state).isfinite().all()


def test_targets():
    model = build()
    add_lora(model, LoraConfig(rank=2, targets=("out_proj",)))
    assert list(lora_layers(model)) == [f"layers.{i}.token_mixer.out_proj" for i in (0, 1)]
    with pytest.raises(
        UserError, match=r"lora.targets has 'qkv_proj'; this model has qkvu_proj, .*did you mean 'qkvu_proj'"
    ):
        add_lora(build(), LoraConfig(rank=2, targets=("qkv_proj",)))


def test_an_adapters_files(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter", base="somewhere/weights")
    settings = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 6.0)
    assert settings["target_modules"] == ["l1", "l2", "l3", "out_proj", "qkvu_proj"]
    assert settings["base_model_name_or_path"] == "somewhere/weights"
    tensors = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert len(tensors) == 2 * 5 * 2
    # PEFT wraps twice, and the Hugging Face model keeps its blocks in `model`.
    key = "base_model.model.model.layers.1.token_mixer.qkvu_proj.lora_"
    assert tensors[f"{key}A.weight"].shape == (4, 32) and tensors[f"{key}B.weight"].shape == (128, 4)

    plain = build()
    assert merge_adapter(plain, tmp_path / "adapter") == 10
    merge_lora(model)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_rank_stabilised_scale(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**settings, "use_rslora": True}))
    plain, name = build(), "layers.0.channel_mixer.l1"
    before = plain.get_submodule(name).weight.clone()
    merge_adapter(plain, tmp_path)
    # alpha / sqrt(4) is twice alpha / 4.
    change = plain.get_submodule(name).weight - before
    torch.testing.assert_close(change, 2 * model.get_submodule(name).product(), rtol=1e-3, atol=1e-6)


def test_alpha_of_some_modules(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**settings, "alpha_pattern": {"channel_mixer.l1": 12}}))
    plain = build()
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    merge_adapter(plain, tmp_path)
    # 12 is twice the adapter's own alpha.
    for name, factor in (("layers.1.channel_mixer.l1", 2), ("layers.1.channel_mixer.l2", 1)):
        change = plain.get_submodule(name).weight - before[f"{name}.weight"]
        torch.testing.assert_close(change, factor * model.get_submodule(name).product(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, UserError, "peft_type is 'IA3'; allowed: LORA"),
        ({"use_dora": True}, UserError, "use_dora is True, which is not supported"),
        ("no config", UserError, "adapter_config.json does not exist; give an adapter's folder"),
        ("no weights", UserError, "adapter_model.safetensors is missing"),
        ("damaged", RunError, "is damaged"),
        (
            "other model",
            UserError,
            "make [48, 32], the weight in this model is [64, 32]; give its own base",
        ),
        ("other key", UserError, "holds 'lora_embedding', which is not a LoRA matrix"),
    ],
    ids=str,
)
def test_adapters_that_are_none(tmp_path, change, error, message):
    save_adapter(trained(), tmp_path)
    config, weights = tmp_path / ADAPTER_CONFIG, tmp_path / ADAPTER_WEIGHTS
    model = build()
    if isinstance(change, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    elif change == "no config":
        config.unlink()
    elif change == "no weights":
        weights.unlink()
    elif change == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    elif change == "other model":
        model = build_model(get_preset("tiny", **{**SMALL, "glu_dim": 64}), seed=0)
    else:
        save_file({"lora_embedding": torch.zeros(2)}, weights)
    with pytest.raises(error) as caught:
        merge_adapter(model, tmp_path)
    assert message in str(caught.value)


def test_saved_merged_weights_are_a_plain_model(tmp_path):
    model = trained()
    merge_lora(model)
    save_model(model, tmp_path / "weights")
    assert torch.equal(load_model(tmp_path / "weights")(TOKENS)[0], model(TOKENS)[0])
