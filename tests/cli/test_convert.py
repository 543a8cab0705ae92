"""`tnllm convert`: what a person types and sees."""

import json
import sys

import pytest

from tests.convert import official_files
from tnllm.errors import UserError
from tnllm.modeling.weights import load_model


@pytest.fixture
def release(tmp_path):
    official_files.write(tmp_path / "release", "v2", "bins")
    return tmp_path / "release"


def test_a_release_becomes_weights_that_generate_knows(tnllm, tmp_path, release):
    code, out, err = tnllm("convert", release, tmp_path / "ours", "--to", "tnllm")
    assert code == 0
    assert out.startswith(f"{tmp_path}/ours: 4 files, ")
    assert "source    official v2, 32,320 parameters, PyTorch pickle, 3 files" in err
    assert "of the largest logit (limit 1e-04)" in err
    assert "has no tokenizer.model and no *.tiktoken" in err
    code, _, err = tnllm("generate", "--model", tmp_path / "ours", "--prompt", "x")
    assert code == 2 and "no tokenizer at" in err


def test_a_folder_that_cannot_be_written_is_said_first(tnllm, tmp_path, release):
    (tmp_path / "file").write_text("")
    for target, said in (
        ("/proc/x", "nothing can be written into /proc"),
        (tmp_path / "file", "is a file, not a folder"),
    ):
        code, out, err = tnllm("convert", release, target, "--to", "tnllm")
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_json(tnllm, tmp_path, release):
    code, out, _ = tnllm("convert", release, tmp_path / "ours", "--to", "tnllm", "--json", "--no-verify")
    answer = json.loads(out)
    assert code == 0 and answer["version"] == "v2" and answer["largest_difference"] is None


def test_dry_run(tnllm, tmp_path, release):
    code, out, _ = tnllm("convert", release, tmp_path / "ours", "--to", "hf", "--dry-run")
    assert code == 0 and not (tmp_path / "ours").exists()
    assert "model.layers.1.token_mixer.qkvu_proj.weight" in out and "128x32  bfloat16" in out
    assert "lm_head.weight" in out and "the embedding again (tied)" in out
    (release / "config.json").write_text(
        json.dumps(official_files.config("v2", decoder_layers=4, linear_use_lrpe_list=[1, 0, 0, 0]))
    )
    code, out, err = tnllm("convert", release, tmp_path / "ours", "--to", "hf", "--dry-run")
    assert code == 2 and out.count("MISSING") == 5 and "5 missing: model.layers.3." in err
    code, out, _ = tnllm("convert", release, tmp_path / "ours", "--to", "hf", "--dry-run", "--json")
    assert code == 2 and len(json.loads(out)["missing"]) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "gguf"], "--to is 'gguf'; allowed: tnllm, hf, official"),
        (["--to", "hf", "--dtype", "int4"], "--dtype is 'int4'; allowed: auto"),
        (["--to", "hf", "--quantize", "int2"], "--quantize is 'int2'; allowed: int8"),
        (["--to", "hf", "--shard-size", "5k"], "--shard-size is '5k'; give at least 1MB"),
    ],
)
def test_bad_options(tnllm, tmp_path, release, args, message):
    code, out, err = tnllm("convert", release, tmp_path / "x", *args)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_no_source(tnllm, tmp_path):
    code, _, err = tnllm("convert", tmp_path / "no", tmp_path / "x", "--to", "hf")
    assert code == 2 and "is not a folder; give a folder with config.json and weights" in err


def test_int8_without_torchao(tnllm, tmp_path, release, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    code, _, err = tnllm("convert", release, tmp_path / "x", "--to", "hf", "--quantize", "int8")
    assert code == 3 and "pip install 'tnllm[quantize]'" in err


def test_int8(tnllm, tmp_path, release):
    pytest.importorskip("torchao")
    code, out, _ = tnllm("convert", release, tmp_path / "x", "--to", "hf", "--quantize", "int8", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["limit"] == 0.25 and 0 < answer["share_of_largest_logit"] < 0.25
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    with pytest.raises(UserError, match="is quantized; load it with transformers"):
        load_model(tmp_path / "x")
