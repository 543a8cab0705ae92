"""LoRA adapters in PEFT's format: merged as PEFT merges them; other kinds are refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.convert import official_files
from tnllm.errors import UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.hf_names import from_official, to_hf_config
from tnllm.modeling.weights import load_model, read_config


@pytest.fixture
def base(tmp_path, run):
    official_files.write(tmp_path / "release", "v1", dtype=torch.float32)
    run(tmp_path / "release", tmp_path / "base", "tnllm", verify=False)
    return tmp_path / "base"


def hub_model(hf_code, base):
    """The exported model class with the base's weights."""
    config, _ = read_config(base)
    model = hf_code.TnllmForCausalLM(hf_code.TnllmConfig(**to_hf_config(config)))
    state = model.state_dict()
    for name, value in load_model(base).state_dict().items():
        state[f"model.{name}"].copy_(value)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_is_what_peft_does(tmp_path, hf_code, base, run, rslora):
    settings = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["qkvu_proj", "out_proj", "l3"],
        use_rslora=rslora,
        alpha_pattern={"l3": 20},
        rank_pattern={"l3": 2},
        init_lora_weights=False,
    )
    tuned = get_peft_model(hub_model(hf_code, base), settings)
    tuned.save_pretrained(tmp_path / "adapter")
    report = run(tmp_path / "adapter", tmp_path / "merged", "tnllm", base=base)
    assert any("merged 9 LoRA pairs" in note for note in report.notes)
    wanted = tuned.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged/model.safetensors")
    before = load_file(base / "model.safetensors")
    for name, value in merged.items():
        assert torch.allclose(value, wanted[f"model.{name}"], rtol=1e-6, atol=1e-6), name
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert len(changed) == 9
    run(tmp_path / "adapter", tmp_path / "hf", "hf", base=base, dtype=torch.bfloat16)


def test_the_sum_is_rounded_once_to_what_is_written(tmp_path, run):
    """A base in 16 bits, merged to float32: nothing is rounded. Merged to 16 bits: the float32 sum is."""
    official_files.write(tmp_path / "release", "v1", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    key, name = "base_model.model.layers.0.token_mixer.out_proj", "layers.0.token_mixer.out_proj.weight"
    write_adapter(tmp_path / "adapter")
    a, b = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter/adapter_model.safetensors")
    exact = official_files.random_tensors("v1", official_files.config("v1"))[f"model.{name}"].float() + 2 * (b @ a)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, None):
        target = tmp_path / str(dtype)
        report = run(tmp_path / "adapter", target, "tnllm", base=tmp_path / "release", dtype=dtype)
        written = load_file(target / "model.safetensors")[name]
        # Without --dtype the result has the base's.
        assert written.dtype == (dtype or torch.bfloat16)
        assert torch.equal(written, exact.to(written.dtype))
        assert any("rounding to" in note for note in report.notes) == (dtype != torch.float32)


def write_adapter(folder, key="layers.0.token_mixer.out_proj", shape=(32, 32), **changes) -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pair = {"A": torch.ones(2, shape[1]), "B": torch.ones(shape[0], 2)}
    save_file(
        {f"base_model.model.{key}.lora_{part}.weight": value for part, value in pair.items()},
        folder / "adapter_model.safetensors",
    )


def test_the_base_an_adapter_names_is_found(tmp_path, base, run):
    write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    run(tmp_path / "adapter", tmp_path / "merged", "tnllm")
    name = "layers.0.token_mixer.out_proj.weight"
    difference = load_file(tmp_path / "merged/model.safetensors")[name] - load_file(base / "model.safetensors")[name]
    # B A is 2 everywhere, and alpha / r is 2.
    assert torch.allclose(difference, torch.full((32, 32), 4.0), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; allowed: LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"key": "layers.7.token_mixer.out_proj"}, "'layers.7.token_mixer.out_proj.weight', which .* does not have"),
        ({"shape": (64, 32)}, r"make \[64, 32\], the weight in .* is \[32, 32\]; give its own base with --base"),
        ({"key": "layers.0.token_mixer.out_proj.lora_magnitude"}, "which .* does not have"),
    ],
)
def test_adapters_that_are_refused(tmp_path, base, run, changes, message):
    write_adapter(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "adapter", tmp_path / "merged", "tnllm", base=base)
    assert not (tmp_path / "merged").exists()


def test_no_base(tmp_path, run):
    write_adapter(tmp_path / "adapter", base_model_name_or_path="somewhere/else")
    with pytest.raises(UserError, match="base 'somewhere/else' is not a folder here; give it with --base"):
        run(tmp_path / "adapter", tmp_path / "merged", "tnllm")


def test_names_of_both_forms():
    assert from_official("model.layers.0.token_mixer.out_proj.weight") == "layers.0.token_mixer.out_proj.weight"
    assert "kind" not in to_hf_config(get_preset("tiny"))
