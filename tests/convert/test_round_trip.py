"""Every released layout in and back, bit for bit, with the logits of the released forward pass on the way."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.convert import official_files
from tests.modeling import official
from tnllm.errors import UserError
from tnllm.generation.loading import load
from tnllm.modeling.weights import load_model
from tnllm.tokenizer import Tokenizer

FORMS = ("bin", "bins", "safetensors", "shards")
CASES = [("v1", form) for form in FORMS] + [("v2", "bins"), ("v2", "shards"), ("v3", "bins"), ("v3", "safetensors")]


def read_folder(folder) -> dict:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_identical(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(("version", "form"), CASES)
def test_released_layouts_round_trip(tmp_path, run, version, form):
    tensors = official_files.write(tmp_path / "release", version, form)
    report = run(tmp_path / "release", tmp_path / "ours", "tnllm")
    assert (report.source.kind, report.source.version) == ("official", version)
    assert (
        report.source.num_parameters
        == sum(value.numel() for value in tensors.values()) - tensors["lm_head.weight"].numel()
    )
    run(tmp_path / "ours", tmp_path / "back", "official")
    back = read_folder(tmp_path / "back")
    assert_identical(back, tensors)
    assert len(back) == (5 if version != "v3" else 7) * 3 + 3
    config = json.loads((tmp_path / "back/config.json").read_text())
    for key, value in official_files.config(version).items():
        if key not in ("transformers_version", "linear_use_lrpe"):
            assert config[key] == value, key


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_hugging_face_folders_round_trip(tmp_path, run, version):
    tensors = official_files.write(tmp_path / "release", version)
    run(tmp_path / "release", tmp_path / "hf", "hf", shard_bytes=4 * 10**6 if version == "v3" else 10**4, verify=False)
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 1 and (tmp_path / "hf/model.safetensors.index.json").is_file()
    run(tmp_path / "hf", tmp_path / "ours", "tnllm", verify=False)
    run(tmp_path / "ours", tmp_path / "back", "official", verify=False)
    assert_identical(read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize(("version", "dtype"), [("v1", torch.float32), ("v2", torch.bfloat16), ("v3", torch.bfloat16)])
def test_logits_are_those_of_the_released_forward(tmp_path, run, version, dtype):
    tensors = official_files.write(tmp_path / "release", version, "bins", dtype)
    run(tmp_path / "release", tmp_path / "ours", "tnllm", verify=False)
    model = load_model(tmp_path / "ours", dtype=torch.float64)
    tokens = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    expected = official.forward({key: value.double() for key, value in tensors.items()}, model.config, tokens)
    logits, _ = model(tokens)
    # The decays are fp32 in the model and float64 in the restatement: 6e-8 relative each.
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_another_layout_of_v3_is_refused(tmp_path, run):
    tensors = official_files.write(tmp_path / "release", "v3", "bin")
    renamed = {key.replace("output_gate.0", "g1"): value for key, value in tensors.items()}
    official_files.write_tensors(tmp_path / "release", renamed, "bin")
    with pytest.raises(UserError, match=r"3 missing: model\.layers\.0\.token_mixer\.output_gate\.0\.weight"):
        run(tmp_path / "release", tmp_path / "x", "tnllm")


def test_v3_says_that_it_is_a_guess(tmp_path, run):
    official_files.write(tmp_path / "release", "v3")
    report = run(tmp_path / "release", tmp_path / "ours", "tnllm", verify=False)
    assert any("no official logits were available" in note for note in report.notes)


def test_a_tiktoken_model_generates(tmp_path, run):
    official_files.write(tmp_path / "release", "v3")
    run(tmp_path / "release", tmp_path / "ours", "tnllm", verify=False)
    ready = load(tmp_path / "ours", device="cpu")
    assert ready.bos_id == 100261 and ready.eos_ids == (100257,)
    text = "Once upon 12 中国 é\n  <s> naïve"
    assert ready.tokenizer.decode(ready.encode(text)) == text


@pytest.mark.parametrize("changes", [{"glu_dim": 32}, {"linear_use_lrpe_list": [1, 1, 1]}, {"linear_act_fun": "none"}])
def test_other_released_choices(tmp_path, run, changes):
    values = official_files.config("v1", **changes)
    tensors = official_files.random_tensors("v1", values)
    for layer in range(3):
        if values["linear_use_lrpe_list"][layer]:
            tensors.setdefault(f"model.layers.{layer}.token_mixer.lrpe.theta", torch.rand(2, 1, 16).bfloat16())
    tensors["lm_head.weight"] = tensors.pop("lm_head.weight")
    (tmp_path / "release").mkdir()
    (tmp_path / "release/config.json").write_text(
        json.dumps({**values, **({"glu_dim": -1} if "glu_dim" in changes else {})})
    )
    official_files.write_tensors(tmp_path / "release", tensors, "safetensors")
    run(tmp_path / "release", tmp_path / "ours", "tnllm")
    run(tmp_path / "ours", tmp_path / "back", "official")
    assert_identical(read_folder(tmp_path / "back"), tensors)


def test_an_untied_head_is_kept(tmp_path, run):
    tensors = official_files.write(tmp_path / "release", "v1", "shards", tie_word_embeddings=False)
    tensors["lm_head.weight"] = torch.randn(97, 32).bfloat16()
    official_files.write_tensors(tmp_path / "release", tensors, "shards")
    for to in ("hf", "tnllm", "official"):
        run(tmp_path / "release", tmp_path / to, to)
        assert torch.equal(read_folder(tmp_path / to)["lm_head.weight"], tensors["lm_head.weight"])


def test_dtype_and_theta(tmp_path, run):
    tensors = official_files.write(tmp_path / "release", "v1", "bin", torch.float32)
    said: list[str] = []
    report = run(tmp_path / "release", tmp_path / "half", "tnllm", dtype=torch.bfloat16)
    # The result is compared with the rounded source, and what rounding does is told.
    assert report.limit == 1e-4 and report.share < 1e-4
    assert any("rounding to torch.bfloat16 moves the logits by up to" in note for note in report.notes)
    half = read_folder(tmp_path / "half")
    theta = "layers.0.token_mixer.lrpe.theta"
    assert torch.equal(half.pop(theta), tensors[f"model.{theta}"])
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    run(tmp_path / "half", tmp_path / "back", "official", said=said)
    # A trained theta does not fit 16 bits, so it stays as it is.
    assert read_folder(tmp_path / "back")[f"model.{theta}"].dtype == torch.float32


def test_files_are_what_readers_expect(tmp_path, run):
    official_files.write(tmp_path / "release", "v1")
    run(tmp_path / "release", tmp_path / "ours", "tnllm")
    with safe_open(tmp_path / "ours/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "release"]
    settings = json.loads((tmp_path / "ours/generation_config.json").read_text())
    assert settings["eos_token_id"] == 2


def test_tiktoken_vocabulary(tmp_path):
    path = tmp_path / "x.tiktoken"
    official_files.write_tiktoken(path)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 100277
    assert tokenizer.piece(100257) == "<|endoftext|>" and tokenizer.token_bytes[100270] == b""
    path.write_text("AAAA 1 2\n")
    with pytest.raises(UserError, match="is not a tiktoken vocabulary"):
        Tokenizer.load(path)


def test_the_script_for_the_released_weights_says_when_it_is_offline(tmp_path):
    """With a network it compares with the authors' code; docs/convert.md says how."""
    command = [sys.executable, "-m", "tests.convert.released", tmp_path / "released"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("offline: OpenNLPLab/TransNormerLLM-385M cannot")
    assert not (tmp_path / "released").exists()
