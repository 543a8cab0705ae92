"""What must not be converted, each refused with one clear line and nothing left behind."""

import errno
import io
import json
import os
import pickle
import shutil
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import official_files
from tnllm import files
from tnllm.convert import check, writer
from tnllm.convert.tensors import open_tensors
from tnllm.errors import CheckFailed, RunError, Terminated, UserError
from tnllm.modeling import lora


def edit_config(folder, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def edit_tensors(folder, **changes) -> None:
    """Change, add or (None) remove tensors of a one-file release."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(run, folder, error, message, to="tnllm", **options) -> None:
    target = folder.parent / "result"
    with pytest.raises(error, match=message) as caught:
        run(folder, target, to, **options)
    assert "\n" not in str(caught.value)
    assert not target.exists() and not list(folder.parent.glob("result*"))


@pytest.fixture
def release(tmp_path):
    official_files.write(tmp_path / "release", "v1", "safetensors")
    return tmp_path / "release"


QKVU = "model.layers.1.token_mixer.qkvu_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QKVU: None}, f"1 missing: {QKVU} "),
        ({"model.layers.9.norm.weight": torch.ones(3)}, "1 unexpected: model.layers.9.norm.weight "),
        (
            {QKVU: torch.ones(96, 32)},
            r"1 of wrong shape: .*qkvu_proj.weight is \[96, 32\], config.json says \[128, 32\]",
        ),
        (
            dict.fromkeys([f"model.layers.{i}.channel_mixer.l{j}.weight" for i in (0, 1) for j in (1, 2, 3)]),
            "and 3 more",
        ),
    ],
)
def test_keys_and_shapes(release, run, changes, message):
    edit_tensors(release, **changes)
    refused(run, release, UserError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; convert reads 'transnormer'"),
        ({"num_kv_heads": 2}, "has 'num_kv_heads', which no released version"),
        ({"norm_type": "layernorm"}, "norm_type is 'layernorm'; every released version has 'simplermsnorm'"),
        ({"hidden_dim": 64}, "hidden_dim is 64"),
        ({"linear_act_fun": "gelu"}, "linear_act_fun is 'gelu'; allowed: swish"),
        ({"linear_use_lrpe_list": [0, 1, 0]}, "linear_use_lrpe_list must have 3 entries"),
        ({"decoder_layers": "3"}, "must be whole numbers"),
        ({"decoder_attention_heads": 5}, "must be a multiple of num_heads"),
        ({"quantization_config": {}}, "quantized"),
        ({"gate_dim": 16}, "6 missing: model.layers.0.token_mixer.qkv_proj.weight|9 missing"),
    ],
)
def test_unknown_versions(release, run, changes, message):
    edit_config(release, **changes)
    refused(run, release, UserError, message)


def test_truncated_and_flipped_safetensors(release, run):
    file = release / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    refused(run, release, RunError, "model.safetensors is damaged")
    file.write_bytes(data[:20] + bytes([data[20] ^ 0xFF]) + data[21:])
    refused(run, release, RunError, "model.safetensors is damaged")
    # One bit of a weight: nothing but a recorded sum can tell.
    flipped = bytearray(data)
    flipped[-1000] ^= 1
    for number, mark in enumerate(" *"):
        (release / "SHA256SUMS").write_text(f"{writer.hashlib.sha256(data).hexdigest()} {mark}model.safetensors\n")
        file.write_bytes(data)
        run(release, release.parent / f"good-{number}", "tnllm")
        file.write_bytes(flipped)
        refused(run, release, RunError, "SHA-256 is not the recorded one")
    # An exponent of all ones.
    tensors = load_file(file)
    tensors[QKVU][3, 3] = float("nan")
    (release / "SHA256SUMS").unlink()
    save_file(tensors, file)
    refused(run, release, RunError, "holds NaN or infinity")


def test_what_the_downloader_recorded_is_checked(release, run):
    metadata = release / ".cache/huggingface/download/model.safetensors.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{'a' * 40}\n{'0' * 64}\n1700000000.0\n")
    refused(run, release, RunError, "SHA-256 is not the recorded one")


@pytest.mark.parametrize("form", ["bin", "bins"])
def test_damaged_pickles(tmp_path, run, form):
    official_files.write(tmp_path / "release", "v1", form)
    file = sorted((tmp_path / "release").glob("*.bin"))[0]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    refused(run, tmp_path / "release", (RunError, UserError), "damaged")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offset = max(archive.infolist(), key=lambda record: record.file_size).header_offset + 500
    flipped = bytearray(data)
    flipped[offset] ^= 1
    file.write_bytes(flipped)
    refused(run, tmp_path / "release", RunError, "damaged .*CRC")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/tnllm-convert-was-here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Evil()}, "asks for (posix|os).system: it holds more than tensors"),
        ({"model": {"x": torch.ones(2)}}, "'model' is a dict; a weights checkpoint holds only tensors"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        (OrderedDict(step=3), "'step' is a int"),
    ],
)
def test_pickles_with_more_than_tensors(tmp_path, run, content, message):
    official_files.write(tmp_path / "release", "v1", "bin")
    torch.save(content, tmp_path / "release/pytorch_model.bin")
    refused(run, tmp_path / "release", UserError, message)
    assert not os.path.exists("/tmp/tnllm-convert-was-here")


def test_plain_pickles_and_old_files(tmp_path, run):
    tensors = official_files.write(tmp_path / "release", "v1", "bin")
    file = tmp_path / "release/pytorch_model.bin"
    file.write_bytes(pickle.dumps({"x": Evil()}))
    refused(run, tmp_path / "release", (RunError, UserError), "pytorch_model.bin")
    assert not os.path.exists("/tmp/tnllm-convert-was-here")
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    run(tmp_path / "release", tmp_path / "result", "tnllm")


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00003.safetensors", "/etc/passwd", "..\\x.safetensors", "a/b.safetensors"]
)
def test_an_index_cannot_point_elsewhere(tmp_path, run, name):
    official_files.write(tmp_path / "release", "v1", "shards")
    index = tmp_path / "release/model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    refused(run, tmp_path / "release", UserError, "shards must lie in the same folder")


def test_an_index_that_lies(tmp_path, run):
    official_files.write(tmp_path / "release", "v1", "shards")
    index = tmp_path / "release/model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    refused(run, tmp_path / "release", UserError, "says that lm_head.weight is in model-00001.* and it is not")
    del values["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(values))
    refused(run, tmp_path / "release", UserError, "holds lm_head.weight, which .* does not list")
    index.write_text("{")
    refused(run, tmp_path / "release", UserError, "is not an index")
    index.unlink()
    refused(run, tmp_path / "release", UserError, "holds no weights; looked for")


def test_a_head_that_is_not_the_embedding(release, run):
    edit_tensors(release, **{"lm_head.weight": torch.ones(97, 32).bfloat16()})
    refused(run, release, UserError, "lm_head.weight differs from the embedding")


def test_a_missing_shard(tmp_path, run):
    official_files.write(tmp_path / "release", "v1", "bins")
    (tmp_path / "release/pytorch_model-00002-of-00003.bin").unlink()
    refused(run, tmp_path / "release", UserError, "pytorch_model-00002-of-00003.bin is missing")


def test_targets(release, run):
    for target in (release, release.parent):
        with pytest.raises(UserError, match="holds the source"):
            run(release, target, "tnllm", overwrite=True)
    (release.parent / "full").mkdir()
    (release.parent / "full/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty; give another folder, or --overwrite"):
        run(release, release.parent / "full", "tnllm")
    assert (release.parent / "full/mine.txt").read_text() == "keep"
    run(release, release.parent / "full", "tnllm", overwrite=True)
    assert not (release.parent / "full/mine.txt").exists()


def test_a_link_and_the_present_folder_are_targets_too(release, run, monkeypatch):
    (release.parent / "real").mkdir()
    for name in ("real", "later"):
        link = release.parent / f"link-to-{name}"
        link.symlink_to(name)
        run(release, link, "tnllm", verify=False)
        assert link.is_symlink() and (release.parent / name / "config.json").is_file()
    (release.parent / "here").mkdir()
    monkeypatch.chdir(release.parent / "here")
    run(release, Path("."), "tnllm", verify=False)
    assert (release.parent / "here/config.json").is_file()
    expected = ["here", "later", "link-to-later", "link-to-real", "real", "release"]
    assert sorted(path.name for path in release.parent.iterdir()) == expected


def test_models_a_target_cannot_describe(tmp_path, run):
    from tnllm.modeling.config import get_preset
    from tnllm.modeling.model import build_model
    from tnllm.modeling.weights import save_model

    small = {"vocab_size": 97, "model_dim": 32, "num_heads": 2, "num_layers": 2, "glu_dim": 48}
    save_model(build_model(get_preset("tiny", norm="rmsnorm", **small), seed=0), tmp_path / "rms")
    refused(run, tmp_path / "rms", UserError, "cannot describe model.norm 'rmsnorm'", to="official")
    v3 = {"gate": "low-rank", "gate_dim": 8, "value_activation": "silu"}
    save_model(build_model(get_preset("tiny", **v3, **small), seed=0), tmp_path / "v3")
    refused(run, tmp_path / "v3", UserError, "cannot describe model.value_activation 'silu'", to="official")
    save_model(build_model(get_preset("tiny", kind="transformer", **small), seed=0), tmp_path / "soft")
    refused(run, tmp_path / "soft", UserError, "--quantize is for TransNormerLLM", to="hf", quantize="int8")
    refused(run, tmp_path / "soft", UserError, "cannot describe model.kind 'transformer'", to="official")
    run(tmp_path / "soft", tmp_path / "copy", "tnllm", dtype=torch.bfloat16)
    refused(run, tmp_path / "rms", UserError, "--quantize is for --to tnllm, hf", to="official", quantize="int8")
    refused(run, tmp_path / "rms", UserError, "--base is for adapters", base=tmp_path)


def test_a_full_disk_leaves_nothing(release, run, monkeypatch):
    usage = shutil.disk_usage(release)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        refused(run, release, RunError, "needs .* free; nothing was written")
    written = []

    def full(output):
        written.append(output.name)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(output)

    original = writer._bytes
    monkeypatch.setattr(writer, "_bytes", full)
    refused(run, release, RunError, "No space left on device.*; nothing was left there")
    assert len(written) == 4


def test_a_second_conversion_into_one_folder_is_refused(release, run, monkeypatch):
    target, caught = release.parent / "result", []
    original = writer._bytes

    def meanwhile(output):
        if not caught:
            with pytest.raises(
                UserError, match=rf"result is being written by pid {os.getpid()} on .*; wait for it"
            ) as refusal:
                run(release, target, "hf", overwrite=True)
            caught.append(refusal)
        return original(output)

    monkeypatch.setattr(writer, "_bytes", meanwhile)
    run(release, target, "tnllm")
    assert caught and not (target / "modeling_tnllm.py").exists()
    assert sorted(path.name for path in release.parent.iterdir()) == ["release", "result"]
    assert not (target / ".lock").exists()
    # The first has ended, and so has its lock.
    run(release, target, "hf", overwrite=True)


@pytest.mark.parametrize("form", ["bins", "safetensors", "shards"])
def test_a_source_that_cannot_be_read_is_named(tmp_path, run, monkeypatch, form):
    """A network drive that goes away in the middle. The destination is not to blame."""
    official_files.write(tmp_path / "release", "v1", form)
    original, written = writer._bytes, []

    def unplugged(output):
        written.append(output.name)
        if len(written) == 3:
            for file in (tmp_path / "release").glob("*model*"):
                file.unlink()
        return original(output)

    monkeypatch.setattr(writer, "_bytes", unplugged)
    refused(run, tmp_path / "release", RunError, r"cannot read .*/release/\S*model\S* \(No such file")


def test_an_adapter_that_cannot_be_read_is_named(tmp_path, run, monkeypatch):
    official_files.write(tmp_path / "release", "v1", "safetensors")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.layers.0.token_mixer.out_proj.lora_{}.weight"
    pair = {key.format("A"): torch.ones(2, 32), key.format("B"): torch.ones(32, 2)}
    save_file(pair, tmp_path / "adapter/adapter_model.safetensors")

    def unplugged(file):
        raise FileNotFoundError(2, "No such file or directory", str(file))

    monkeypatch.setattr(lora, "load_file", unplugged)
    with pytest.raises(RunError, match=r"cannot read .*/adapter/adapter_model\.safetensors"):
        run(tmp_path / "adapter", tmp_path / "result", "tnllm", base=tmp_path / "release", verify=False)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("when", ["write", "check", "rename"])
@pytest.mark.parametrize("exists", [True, False])
def test_sigterm_keeps_the_old_folder(release, run, monkeypatch, when, exists):
    target = release.parent / "result"
    if exists:
        target.mkdir()
        (target / "mine.txt").write_text("keep")
    module, name = {"write": (writer, "_bytes"), "check": (check, "block_logits"), "rename": (os, "replace")}[when]
    original = getattr(module, name)

    def stop(*args):
        if when != "rename" or "tmp-convert" in str(args[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, name, stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="stopped by SIGTERM"):
        run(release, target, "tnllm", overwrite=True)
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in release.parent.iterdir()) == ["release", *(["result"] if exists else [])]
    assert not exists or (target / "mine.txt").read_text() == "keep"


def test_a_wrong_result_is_thrown_away(release, run, monkeypatch):
    block_logits = check.block_logits
    monkeypatch.setattr(check, "block_logits", lambda *args: block_logits(*args) * 1.001)
    refused(run, release, CheckFailed, "the logits of the result differ")
    assert CheckFailed("").exit_code == 4
    run(release, release.parent / "result", "tnllm", verify=False)


def test_interruption_leaves_nothing(release, run, monkeypatch):
    def stop(output):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        run(release, release.parent / "new/deep/result", "tnllm")
    assert sorted(path.name for path in release.parent.iterdir()) == ["release"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interruption_of_the_last_step_keeps_the_old_folder(release, run, monkeypatch, call):
    target = release.parent / "result"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    real, calls = getattr(os, call), []

    def stop(*args):
        calls.append(args)
        # Of the renames the second, which would put the new folder in place of the old one.
        if len(calls) == {"fsync": 1, "replace": 2}[call]:
            raise KeyboardInterrupt
        return real(*args)

    replace_dir = files.replace_dir

    def interrupted(temporary, final):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, stop)
            replace_dir(temporary, final)

    monkeypatch.setattr(files, "replace_dir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(release, target, "tnllm", overwrite=True)
    assert calls and (target / "mine.txt").read_text() == "keep"
    assert sorted(path.name for path in release.parent.iterdir()) == ["release", "result"]


def test_overflow_of_float16(release, run):
    tensors = load_file(release / "model.safetensors")
    tensors[QKVU][0, 0] = 1e6
    edit_tensors(release, **tensors)
    refused(run, release, RunError, "overflows float16; convert to bfloat16 or float32", dtype=torch.float16)


def test_quantized_tensors(release):
    edit_tensors(release, **{QKVU: torch.ones(128, 32, dtype=torch.int8)})
    with pytest.raises(UserError, match="is I8, a quantized or unknown type"):
        open_tensors(release)


def test_distcp_checkpoints(tmp_path, run):
    official_files.write(tmp_path / "x", "v1")
    run(tmp_path / "x", tmp_path / "ours", "tnllm", verify=False)
    (tmp_path / "ours/model").mkdir()
    (tmp_path / "ours/model/__0_0.distcp").write_bytes(b"x")
    refused(run, tmp_path / "ours", UserError, ".distcp files hold pickles and are not read")
