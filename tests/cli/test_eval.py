"""`tnllm eval` and `bench-eval` as a person meets them."""

import csv
import json

import pytest
import torch

from tests.small_models import small_model
from tnllm import assets
from tnllm.cli.evaluation_view import show_results
from tnllm.evaluation import sharing_bench
from tnllm.modeling.weights import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_model(small_model(vocab_size=8192, num_layers=1), path, assets.tokenizer_model())
    return path


def test_answers_at_once_offline_and_is_labelled_a_sample(tnllm, folder, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = tnllm("eval", "--tasks", "mmlu,ceval", "--model", folder, "--limit", 1, "--out", out)
    assert code == 0
    assert "mmlu (sample)" in stdout and "ceval-valid (sample)" in stdout
    assert "ceval is ceval-valid in lm-evaluation-harness" in stderr
    assert "a sample that ships with tnllm, not a score" in stderr
    code, stdout, stderr = tnllm("eval", "compare", out, out, "--paper", "385m")
    assert code == 0 and "+0.00" in stdout and "A is a packaged sample" in stderr
    code, stdout, _ = tnllm("eval", "compare", out, "--paper", "385m", "--json")
    rows = json.loads(stdout)["rows"]
    assert {row["paper"] for row in rows if row["task"] == "mmlu"} == {25.90}
    assert {tuple(row["notes"]) for row in rows if row["task"] == "mmlu"} == {
        ("sample", "limit 1", "0 shots, not the paper's 5")
    }
    code, stdout, _ = tnllm("eval", "compare", out, "--paper", "385m")
    line = next(line for line in stdout.splitlines() if line.strip().startswith("mmlu "))
    assert "mmlu (sample; limit 1; 0 shots, not the paper's 5)" in line and line.split()[-1] == "25.90"
    assert all("sample" in row["notes"] for row in rows if row["task"].startswith("mmlu_"))


def test_groups_of_groups_and_filters_are_told_apart(capsys):
    values = {"exact_match,strict": 0.5, "exact_match,none": 0.25}
    results = {
        "results": {"all": values, "part": values, "one": values, "two": values}, "versions": {},
        "group_subtasks": {"all": ["part"], "part": ["one", "two"]}, "n-shot": {"one": 5, "two": 5},
    }  # fmt: skip
    show_results(results, subtasks=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "exact_match" in line]
    assert rows[:2] == [["all", "5", "exact_match", "(strict)", "50.00"], ["all", "5", "exact_match", "25.00"]]
    results["n-shot"]["two"] = 0
    show_results(results, subtasks=False)
    assert ["all", "exact_match", "25.00"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_last_line_says_what_came_from_the_cache(tnllm, folder, tmp_path):
    asked = ("eval", "--tasks", "piqa", "--model", folder, "--cache-dir", tmp_path)
    first, some, every = (tnllm(*asked, "--limit", count)[2].splitlines()[-2] for count in (1, 2, 2))
    assert "tokens computed for" in first and "cache" not in first
    assert "2 of 4 answers from the cache, " in some and " asked for the others" in some
    assert "all 4 answers from the cache, " in every and "computed" not in every


@pytest.mark.slow
def test_check_against_the_hf_model(tnllm, folder, tmp_path, monkeypatch):
    code, stdout, _ = tnllm("eval", "check", "--tasks", "piqa,winogrande", "--model", folder, "--limit", 2)
    assert code == 0 and "0 answers differ in 4 questions" in stdout and "seconds hf" in stdout
    code, stdout, _ = tnllm("eval", "check", "--tasks", "piqa", "--model", folder, "--limit", 1, "--json")
    [row] = json.loads(stdout)["tasks"]
    assert code == 0 and row["questions"] == 1 and set(row["seconds"]) == {"tnllm", "hf"}
    monkeypatch.setattr("tnllm.evaluation.hf_check.TOLERANCE", {torch.float32: 0.0})
    code, stdout, stderr = tnllm("eval", "check", "--tasks", "piqa", "--model", folder, "--limit", 1)
    assert code == 4 and "answers differ" in stdout and "above the tolerance of 0 for float32" in stderr
    (tmp_path / "wiki.test.raw").write_text(" = A = \n one \n")
    code, _, stderr = tnllm("eval", "check", "--tasks", "wikitext", "--model", folder, "--data-dir", tmp_path)
    assert code == 2 and "wikitext is a loglikelihood_rolling task; this works with multiple-choice" in stderr
    monkeypatch.setattr("tnllm.evaluation.hf_check.find_spec", lambda name: None)
    code, stdout, stderr = tnllm("eval", "check", "--tasks", "piqa")
    assert (
        code == 3 and not stdout and stderr.splitlines()[-1].startswith("tnllm: this needs transformers, which is not")
    )


def test_a_list_of_tasks(tnllm):
    code, stdout, stderr = tnllm("eval", "ls")
    assert code == 0 and "ceval-valid" in stdout and "CC BY-NC-SA 4.0" in stdout and "tnl-paper" in stderr
    code, stdout, _ = tnllm("eval", "ls", "lambada_op*")
    assert code == 0 and "lambada_openai" in stdout.split()


def test_perplexity_of_a_file(tnllm, folder, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time.\n" * 30)
    code, stdout, _ = tnllm("eval", "ppl", tmp_path / "text.txt", "--model", folder, "--window", 32, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["documents"] == 1 and result["bytes"] == 540 and result["windows"]["window"] == 32
    code, stdout, _ = tnllm("eval", "ppl", tmp_path / "text.txt", "--model", folder)
    assert code == 0 and "bits per byte" in stdout and "0 to 63" in stdout


@pytest.mark.slow
def test_requests_and_their_benchmark(tnllm, folder, tmp_path, monkeypatch):
    file = tmp_path / "requests.xz"
    code, stdout, _ = tnllm("eval", "requests", file, "--tasks", "mmlu", "--limit", 1, "-n", 5)
    assert code == 0 and "5 questions, 20 requests" in stdout and "x fewer" in stdout
    code, stdout, _ = tnllm("bench-eval", file, "--model", folder, "--json", tmp_path / "bench.json")
    assert code == 0 and "0 of 5 answers differ" in stdout
    assert json.loads((tmp_path / "bench.json").read_text())["token_ratio"] > 4
    # Too far apart is an error, but not before all is shown and written.
    monkeypatch.setitem(sharing_bench.TOLERANCE, torch.float32, -1.0)
    code, stdout, stderr = tnllm("bench-eval", file, "--model", folder, "--json", tmp_path / "far.json")
    assert code == 1 and "0 of 5 answers differ" in stdout and "its speeds do not count" in stderr
    assert json.loads((tmp_path / "far.json").read_text())["agreement"]["tolerance"] == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no tasks; give --tasks mmlu,ceval"),
        (["--tasks", "mmul"], "did you mean 'mmlu'?"),
        (["--tasks", "PIQA"], "did you mean 'piqa'?"),
        (["--tasks", "mmlu", "--limit", "0"], "--limit is 0; give a number of questions from 1"),
        (["--tasks", "boolq"], "none ship with tnllm; give --data-dir"),
        (["--tasks", "mmlu", "--data-dir", "/nowhere"], "--data-dir /nowhere is not a folder"),
        (["--tasks", "mmlu", "--batch-size", "many"], "--batch-size is 'many'; allowed: auto"),
        (["--tasks", "mmlu", "--log-samples"], "say where with --out DIR"),
        (["--tasks", "mmlu", "--gen-kwargs", "temperature"], "write name=value with commas"),
        (["--tasks", "tnl-paper", "-n", "3"], "tnl-paper fixes its number of examples"),
        (["check", "--tasks", ","], "no tasks; give --tasks openbookqa,piqa"),
        (["requests", "x.npz.xz", "--tasks", ","], "no tasks; give --tasks mmlu"),
        (["check", "--tasks", "piqa", "--dtype", "float16"], "--dtype is 'float16'; allowed: float32, bfloat16"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere does not exist; give a results_*.json"),
        (["ls", "zzzzzz"], "no task matches 'zzzzzz'"),
        (["--tasks", "mine", "--include-path", "/nowhere"], "--include-path /nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_line(tnllm, arguments, message):
    code, stdout, stderr = tnllm("eval", *arguments)
    assert code == 2 and not stdout
    assert message in stderr.splitlines()[-1] and stderr.splitlines()[-1].startswith("tnllm: ")


def test_a_model_without_a_tokenizer_is_told(tnllm, tmp_path):
    save_model(small_model(vocab_size=8192, num_layers=1), tmp_path / "bare")
    code, _, stderr = tnllm("eval", "--tasks", "piqa", "--model", tmp_path / "bare")
    assert code == 2 and "no tokenizer at" in stderr


def test_a_needle_by_length_and_depth(tnllm, folder, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The ship left the harbour before dawn. It was cold, and the crew was silent all morning. " * 3)
    out = tmp_path / "rows.csv"
    flags = ["--lengths", "160,200", "--depths", "50,0,50", "-n", 1, "--haystack", book, "--csv", out]
    code, stdout, _ = tnllm("eval", "niah", "--model", folder, *flags)
    assert code == 0 and "exact / chosen of ten" in stdout
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["length"], row["depth"]) for row in rows] == [("160", "0"), ("160", "50"), ("200", "0"), ("200", "50")]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lengths", "20"], "no room for needle and question; give 128 or more"),
        (["--depths", "0,150"], "per cents from 0 to 100"),
        (["--lengths", "many"], "write tokens such as"),
        (["--haystack", "missing.txt"], "missing.txt"),
        (["--csv", "no/folder/rows.csv"], "no/folder"),
    ],
)
def test_a_bad_needle_is_one_line(tnllm, folder, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = tnllm("eval", "niah", "--model", folder, "-n", 1, *flags)
    assert code == 2 and message in stderr and "Traceback" not in stderr
