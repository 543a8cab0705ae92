"""Folders of every kind of source, loaded by transformers' own `from_pretrained`: the numbers are the source's."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.convert import official_files
from tests.convert.test_refusals import refused
from tests.modeling import official
from tnllm import assets
from tnllm.errors import UserError
from tnllm.generation.loading import load
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import load_model, save_model

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 97, "model_dim": 32, "num_heads": 2, "num_layers": 3, "glu_dim": 48}


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers copies a folder's code to its cache, and imports it from there as parts of one package."""
    forget = lambda: [sys.modules.pop(name) for name in list(sys.modules) if name.startswith("transformers_modules")]  # noqa: E731
    forget()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Without the caches of other tests in this process, whose package of that name would be found first.
    others = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    yield
    forget()


def hf_model(folder, **more):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more).eval()


def tokens_of(vocab_size):
    return torch.randint(vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_released_layouts(tmp_path, run, version):
    tensors = official_files.write(tmp_path / "release", version, "bins", torch.float32)
    run(tmp_path / "release", tmp_path / "hf", "hf")
    model = hf_model(tmp_path / "hf")
    tokens = tokens_of(97)
    with torch.no_grad():
        logits = model(tokens).logits.double()
    config = load_model(tmp_path / "hf").config
    expected = official.forward({key: value.double() for key, value in tensors.items()}, config, tokens)
    # fp32 products of 32 to 100,280 columns; logits reach about 30.
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if version == "v3":
        text = "Once upon 12 中国 é"
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
        assert tokenizer(text)["input_ids"] == load(tmp_path / "hf", device="cpu").tokenizer.encode(text)
        assert model.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape == (1, 21)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_int8(tmp_path, run, version):
    pytest.importorskip("torchao")
    official_files.write(tmp_path / "release", version, "bins", torch.float32)
    run(tmp_path / "release", tmp_path / "plain", "hf", verify=False)
    run(tmp_path / "release", tmp_path / "int8", "hf", quantize="int8")
    model, plain = hf_model(tmp_path / "int8"), hf_model(tmp_path / "plain")
    weight = model.model.layers[1].channel_mixer.l1.weight
    assert type(weight) is not torch.nn.Parameter and "int8" in str(weight).lower()
    exact = plain.model.layers[1].channel_mixer.l1.weight
    # Half a step of 1/127 of each row's largest value.
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight.dequantize() - exact).abs() <= 0.51 * step).all()
    with torch.no_grad():
        logits, expected = model(tokens_of(97)).logits, plain(tokens_of(97)).logits
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert 0 < difference < 0.25  # the conversion's own limit
    assert model.generate(tokens_of(97)[:1], max_new_tokens=2, do_sample=False).shape == (1, 21)


def baseline(folder, **more):
    model = build_model(get_preset("tiny", **{**SMALL, "kind": "transformer", **more}), seed=0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Norm weights away from 1, matrices large enough that all of them matter.
            value.copy_(1 + 0.3 * torch.randn_like(value) if "norm" in name else 10 * value)
    save_model(model, folder)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "family"),
    [
        ({}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"tie_embeddings": False, "rope_base": 500.0, "norm": "srmsnorm", "glu_activation": "none"}, "llama"),
        ({"rope_scaling": "linear", "rope_factor": 4.0}, "llama"),
        # The first of the channels keeps its speed, the last is scaled, and some between are mixed.
        ({"qk_norm": True, "rope_scaling": "yarn", "rope_factor": 8.0, "rope_length": 250}, "qwen3"),
    ],
)
def test_the_softmax_baseline_is_a_model_of_transformers(tmp_path, run, more, family):
    model = baseline(tmp_path / "source", **more)
    report = run(tmp_path / "source", tmp_path / "hf", "hf")
    assert report.share is not None and report.share < 1e-4
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == family and "auto_map" not in config and not list((tmp_path / "hf").glob("*.py"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = tokens_of(97)
    with torch.no_grad():
        expected, _ = model(tokens)
        # fp32, another order of sums in the products.
        assert torch.allclose(
            loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    with pytest.raises(UserError, match="from which there is no way back; convert the run"):
        run(tmp_path / "hf", tmp_path / "back", "tnllm")
    run(tmp_path / "source", tmp_path / "half", "hf", dtype=torch.bfloat16, shard_bytes=10**4)
    stored = {
        key: value for file in (tmp_path / "half").glob("*.safetensors") for key, value in load_file(file).items()
    }
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_a_baseline_that_transformers_cannot_compute_is_refused(tmp_path, run):
    for name, more in (("norm", {"norm": "layernorm"}), ("scale_embedding", {"scale_embedding": True})):
        baseline(tmp_path / name, **more)
        refused(run, tmp_path / name, UserError, f"transformers' Llama cannot compute model.{name}", to="hf")


@pytest.mark.slow
def test_a_run_of_the_baseline_says_how_long_it_read(tmp_path, run):
    weights = tmp_path / "run/weights"
    model = build_model(get_preset("tiny", **{**SMALL, "kind": "transformer", "vocab_size": 8192}), seed=0)
    save_model(model, weights, assets.tokenizer_model())
    (tmp_path / "run/config.resolved.yaml").write_text("data: {seq_len: 512}\n")
    run(tmp_path / "run", tmp_path / "hf", "hf", verify=False)
    assert json.loads((tmp_path / "hf/config.json").read_text())["max_position_embeddings"] == 512
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("The river")["input_ids"]
    assert ids == load(weights, device="cpu").tokenizer.encode("The river")
