"""`tnllm recipes` as a person meets it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tnllm.recipe import describe_keys
from tnllm.training.config import FORMAT, load_recipe

Run = Callable[..., tuple[int, str, str]]


def test_list(tnllm: Run) -> None:
    code, out, err = tnllm("recipes", "list")
    assert code == 0 and "tnllm train RECIPE" in err
    line = next(line for line in out.splitlines() if line.split()[:1] == ["385m"])
    assert line.split()[1:3] == ["399M", "1T"]
    code, out, _ = tnllm("recipes", "list", "--json")
    result = json.loads(out)
    assert [item["parameters"] for item in result] == sorted(item["parameters"] for item in result)
    assert {item["recipe"]: item["parameters"] for item in result}["7b"] == 6_836_719_616


@pytest.mark.parametrize("doc", [[], ["--doc"]])
def test_what_show_prints_is_a_recipe(tnllm: Run, tmp_path: Path, doc: list[str]) -> None:
    code, out, err = tnllm("recipes", "show", "demo", "--set", "train.seed=3", *doc)
    assert (code, err) == (0, "")
    (tmp_path / "mine.yaml").write_text(out)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("demo", ["train.seed=3"])


def test_show_doc_explains_every_key(tnllm: Run) -> None:
    _, out, _ = tnllm("recipes", "show", "demo", "--doc")
    words = " ".join(out.replace("#", " ").split())
    assert [key for key, text in describe_keys(FORMAT).items() if " ".join(text.split()) not in words] == []


def test_show_json(tnllm: Run) -> None:
    _, out, _ = tnllm("recipes", "show", "tiny", "--json")
    assert json.loads(out)["data"]["seq_len"] == 256


def test_check_says_ok(tnllm: Run) -> None:
    code, out, err = tnllm("recipes", "check", "tiny", "385m")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "385m: ok, 399M parameters, 1907349 steps, 1T tokens, 1 rank"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "data.path=nowhere",
            "tnllm: data.path is nowhere: no such file or folder (the corpora that ship are called sample",
        ),
        ("tokenizer.path=nowhere", "tnllm: no tokenizer at nowhere; give a tokenizer.model or a folder that holds one"),
        ("model.vocab_size=4096", "has 8192 pieces, more than model.vocab_size 4096; set model.vocab_size=8192 or"),
        ("eval.tasks=piqua", "tnllm: task 'piqua' is not known; did you mean 'piqa'"),
        ("eval.tasks=sciq", "tnllm: eval.tasks: no data for sciq"),
        ("data.chat_template=Hello data.format=chat", "it must hold {prompt} once"),
        ("data.path=pyproject.toml", "tnllm: pyproject.toml is not"),
        ("lora.rank=200", "tnllm: lora.rank is 200, more than the 128 channels of the narrowest projection; lower it"),
        ("lora.rank=2 lora.targets=[qkv_proj]", "tnllm: lora.targets has 'qkv_proj'; this model has qkvu_proj, "),
        ("train.seeed=1", "tnllm: train.seeed: no such key; did you mean 'train.seed'? (--set)\n"),
    ],
)
def test_check_names_what_would_stop_a_run(tnllm: Run, setting: str, message: str) -> None:
    flags = [part for item in setting.split() for part in ("--set", item)]
    code, out, err = tnllm("recipes", "check", "tiny", *flags)
    assert (code, out) == (2, "")
    # A line before it may say that questions are read.
    assert message in err and err.count("tnllm: ") == 1


def test_check_goes_on_after_a_bad_one_and_speaks_json(tnllm: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train:\n  max_steps: -1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-data.yaml").write_text(f"base: tiny\ndata:\n  path: {tmp_path / 'empty'}\n")
    paths = [str(tmp_path / "bad.yaml"), str(tmp_path / "no-data.yaml"), "tiny"]
    code, out, err = tnllm("recipes", "check", *paths)
    assert code == 2 and out.startswith("tiny: ok, ") and len(err.splitlines()) == 3
    assert err.endswith(f"tnllm: 2 of 3 recipes would not start: {paths[0]}, {paths[1]}\n")
    code, out, _ = tnllm("recipes", "check", *paths, "--json")
    assert code == 2
    bad, no_data, good = json.loads(out)
    assert bad["error"].startswith("train.max_steps is -1: expected a whole number")
    assert no_data["error"] == f"data.path is {tmp_path / 'empty'}: the folder is empty"
    assert good["ok"] and good["parameters"] == 1_917_056


def test_unknown_recipe(tnllm: Run) -> None:
    code, _, err = tnllm("recipes", "show", "tinny")
    assert code == 2
    assert err.startswith("tnllm: no recipe tinny: ") and err.endswith("; did you mean 'tiny'?\n")
