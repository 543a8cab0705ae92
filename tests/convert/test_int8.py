"""--quantize int8 with --to tnllm: a folder that loads as it is, of the same weights as rounding at load gives."""

import json
import re

import pytest
import torch

from tests.small_models import small_model
from tnllm import assets
from tnllm.convert.checksums import SUMS, recorded_sums, verify_sums
from tnllm.errors import UserError
from tnllm.generation.context import weights_hash
from tnllm.generation.decoder import generate_text
from tnllm.generation.loading import load
from tnllm.modeling.weights import load_model, save_model

TOKENIZER = assets.demo_weights() / "tokenizer.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "model"
    save_model(small_model(vocab_size=8192, softmax_every=2), path, TOKENIZER)
    return path


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10**6])
def test_the_folder_loads_without_a_flag(run, folder, tmp_path, shard_bytes):
    (tmp_path / "text").write_text("Once upon a time there was a folder. " * 200, encoding="utf-8")
    target = tmp_path / "int8"
    report = run(folder, target, "tnllm", quantize="int8", text=tmp_path / "text", shard_bytes=shard_bytes)
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "int8" and SUMS in report.files and 0 < report.share < 0.25
    sums = recorded_sums(target, sorted(target.iterdir()))
    assert len(sums) == len(report.files) - 1
    verify_sums(sums, lambda *_: None)
    ready, rounded = load(target, "cpu"), load(folder, "cpu", "int8")
    assert ready.model.is_int8 and weights_hash(ready.model) == weights_hash(rounded.model)
    texts = [generate_text(each.model, each.tokenizer, "Once", max_tokens=9, seed=1) for each in (ready, rounded)]
    assert texts[0] == texts[1]
    assert load(target, "cpu", "float32").model.dtype_name == "float32"
    # The notes say what rounding costs: checked against the two models.
    ids = torch.tensor(ready.encode((tmp_path / "text").read_text()))
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)
    num_bytes = sum(len(ready.tokenizer.token_bytes[id]) for row in rows.tolist() for id in row[1:])
    exact, after = (load_model(each, dtype=torch.float32)(rows)[0].double() for each in (folder, target))
    bits = [
        float(torch.nn.functional.cross_entropy(logits[:, :-1].mT, rows[:, 1:], reduction="sum"))
        / torch.tensor(2.0).log().item()
        / num_bytes
        for logits in (exact, after)
    ]
    same = (exact.argmax(-1) == after.argmax(-1)).double().mean()
    [note] = [note for note in report.notes if "bits per byte" in note]
    before, after, _, agreed = (float(number) for number in re.findall(r"-?\d+\.\d+", note.rpartition("text: ")[2])[:4])
    # Sums in another order change the last digits, and which of two equally likely tokens is first.
    assert [before, after] == pytest.approx(bits, abs=2e-4) and agreed == pytest.approx(100 * same, abs=0.5)
    assert any("of the check's tokens have the same" in note for note in report.notes)


def test_what_it_does_not_do_is_refused(run, folder, tmp_path):
    run(folder, tmp_path / "int8", "tnllm", quantize="int8", verify=False)
    for to in "tnllm", "hf", "official":
        with pytest.raises(UserError, match="is I8, a quantized or unknown type; convert the weights"):
            run(tmp_path / "int8", tmp_path / to, to)
    with pytest.raises(UserError, match="leave out --dtype"):
        run(folder, tmp_path / "x", "tnllm", quantize="int8", dtype=torch.bfloat16)
    (tmp_path / "short").write_text("", encoding="utf-8")
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 9)
    for name, message in ("short", "give at least two"), ("latin", "is not UTF-8"):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "x", "tnllm", quantize="int8", text=tmp_path / name)
        assert not (tmp_path / "x").exists()
