import json

import pytest

from tnllm.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time there was a king who had three sons.\n从前有一个国王。\n" * 30, encoding="utf-8")
    return path


def test_train_and_inspect(tnllm, corpus, tmp_path):
    out = tmp_path / "mine"
    code, stdout, _ = tnllm("tokenizer", "train", corpus, "--vocab-size", 340, "-o", out)
    assert code == 0 and stdout.startswith(f"{out / 'tokenizer.model'}: 340 tokens, ")
    tokenizer = Tokenizer.load(out)
    code, stdout, _ = tnllm("tokenizer", "inspect", out, "--text", "a 国\n", "--file", corpus, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["vocab_size"] == 340 and result["sha256"] == tokenizer.sha256
    assert [id for id, _ in result["tokens"]] == tokenizer.encode("a 国\n")
    assert result["decoded"] == "a 国\n"
    text = corpus.read_text()
    assert result["bytes_per_token"] == round(len(text.encode()) / len(tokenizer.encode(text)), 3)


def test_a_tokenizer_is_not_replaced_unasked(tnllm, corpus, tmp_path):
    args = ("tokenizer", "train", corpus, "--vocab-size", 340, "-o", tmp_path)
    assert tnllm(*args)[0] == 0
    code, _, stderr = tnllm(*args)
    assert code == 2 and "tokenizer.model exists; choose another --out or add --overwrite" in stderr
    assert tnllm(*args, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vocab-size", "12"], "vocabulary size is 12; byte fallback alone needs 256: give 320 or more"),
        (["--vocab-size", "32000"], "vocabulary size is 32000; this text allows at most"),
        (["--character-coverage", "2"], "character coverage is 2.0; give a share from 0.98 to 1"),
    ],
)
def test_train_says_what_is_wrong(tnllm, corpus, tmp_path, args, message):
    code, stdout, stderr = tnllm("tokenizer", "train", corpus, "-o", tmp_path / "mine", *args)
    assert (code, stdout) == (2, "")
    assert message in stderr.splitlines()[-1]
    assert not (tmp_path / "mine").exists()


def test_without_a_model_the_shipped_one_is_shown(tnllm):
    code, stdout, _ = tnllm("tokenizer", "inspect", "--text", "Hello 2024")
    assert code == 0 and "vocab_size      8192" in stdout and "decoded         Hello 2024" in stdout


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_help_ends_with_an_example(tnllm, command):
    code, stdout, _ = tnllm("tokenizer", command, "--help")
    assert code == 0 and "Examples:" in stdout and f"tnllm tokenizer {command} " in stdout
