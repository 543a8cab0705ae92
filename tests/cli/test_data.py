import json

import pytest

LINES = [{"text": f"Document {i}: 从前有一个国王。\n"} for i in range(40)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def test_tokenize_and_inspect(tnllm, corpus, tmp_path):
    out = tmp_path / "tokens"
    code, stdout, stderr = tnllm("data", "tokenize", corpus, "-o", out, "--val_fraction", "0.2")
    assert (code, stderr) == (0, "")
    train, val, summary = stdout.splitlines()
    counts = [int(line.split()[1]) for line in (train, val)]
    assert sum(counts) == 40 and train.split()[2] == "documents"
    assert summary.startswith(f"{out}: 2 shards in ")

    code, stdout, _ = tnllm("data", "inspect", out, "--verify", "--json", "--samples", "1")
    result = json.loads(stdout)
    assert code == 0 and result["complete"] and result["hashes"] == "all match"
    assert [result["splits"][split]["documents"] for split in ("train", "val")] == counts
    assert sum(split["text_bytes"] for split in result["splits"].values()) == sum(
        len(line["text"].encode()) for line in LINES
    )
    assert result["samples"] == [LINES[0]["text"]]
    code, stdout, _ = tnllm("data", "inspect", out)
    assert code == 0 and "bytes per token" in stdout and "all match" not in stdout


def test_inspect_a_corpus(tnllm, corpus):
    with open(corpus, "ab") as file:
        file.write(b'junk\n{"text": ""}\n')
    code, stdout, stderr = tnllm("data", "inspect", corpus, "--json")
    result = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert (result["documents"], result["empty_documents"], result["bad_documents"]) == (41, 1, 1)
    assert result["bad"] == [f"{corpus}:41: invalid JSON (Expecting value, column 1)"]
    assert result["letters_by_script"] == {"han": 40 * 7, "latin": 40 * 8}
    code, stdout, _ = tnllm("data", "inspect", corpus)
    assert code == 0 and f"{corpus}:41: invalid JSON" in stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere.txt", "-o", "OUT"], 2, "no such file or folder: nowhere.txt"),
        (["CORPUS", "-o", "OUT", "--tokenizer", "nowhere"], 2, "no tokenizer at nowhere; give a tokenizer.model"),
        (
            ["CORPUS", "-o", "OUT", "--field", "body"],
            2,
            "web.jsonl:1: no field 'body' (fields: text; choose one of them); fix it",
        ),
        (["CORPUS", "-o", "OUT", "--val-fraction", "2"], 2, "the validation fraction is 2.0; give a share"),
        (["CORPUS", "-o", "OUT", "--shard-tokens", "many"], 2, "--shard-tokens is 'many'; write a number such as"),
        (["CORPUS", "-o", "OUT", "--on-error", "ask"], 2, "'ask' is not one of 'stop', 'skip'"),
        (["CORPUS"], 2, "Missing option '--out'"),
    ],
)
def test_tokenize_says_what_is_wrong(tnllm, corpus, tmp_path, args, code, message):
    places = {"CORPUS": corpus, "OUT": tmp_path / "out"}
    exit_code, stdout, stderr = tnllm("data", "tokenize", *[places.get(arg, arg) for arg in args])
    assert (exit_code, stdout) == (code, "")
    assert stderr.count("\n") == 1 and stderr.startswith("tnllm: ") and message in stderr


def test_text_that_is_not_utf8_and_skipping_it(tnllm, corpus, tmp_path):
    with open(corpus, "ab") as file:
        file.write('{"text": "café"}\n'.encode("latin-1"))
    code, _, stderr = tnllm("data", "tokenize", corpus, "-o", tmp_path / "out")
    assert code == 2
    assert f"{corpus}:41: not UTF-8 (byte 14 of the line); fix it, or leave such documents out with" in stderr
    code, stdout, stderr = tnllm("data", "tokenize", corpus, "-o", tmp_path / "out", "--on-error", "skip")
    assert code == 0
    assert stderr == f"left out: {corpus}:41: not UTF-8 (byte 14 of the line)\n"
    assert stdout.splitlines()[-1].endswith("left out 0 empty and 1 bad documents")


def test_a_truncated_shard_ends_with_code_1(tnllm, corpus, tmp_path):
    out = tmp_path / "out"
    tnllm("data", "tokenize", corpus, "-o", out)
    (out / "train-00000.bin").write_bytes(b"")
    code, stdout, stderr = tnllm("data", "inspect", out)
    assert (code, stdout) == (1, "")
    assert "train-00000.bin has 0 bytes, the manifest says" in stderr and stderr.count("\n") == 1


def test_verifying_a_corpus_makes_no_sense(tnllm, corpus):
    code, _, stderr = tnllm("data", "inspect", corpus, "--verify")
    assert code == 2 and "is not a folder of token shards, so there is no hash to verify" in stderr


@pytest.mark.parametrize("command", ["tokenize", "inspect"])
def test_help_ends_with_an_example(tnllm, command):
    code, stdout, _ = tnllm("data", command, "--help")
    assert code == 0 and "Examples:" in stdout and f"tnllm data {command} " in stdout


def test_the_sample_is_written_and_every_command_takes_its_name(tnllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = tnllm("data", "sample", "-o", "corpus")
    assert (code, stdout.split()) == (0, ["corpus/sample.jsonl", "corpus/NOTICE"])
    with open(tmp_path / "corpus" / "sample.jsonl", encoding="utf-8") as file:
        assert {"text", "lang", "source"} <= json.loads(next(file)).keys()
    code, _, stderr = tnllm("data", "sample", "-o", "corpus")
    assert code == 2 and "corpus/sample.jsonl exists; choose another folder" in stderr
    code, stdout, _ = tnllm("data", "sample", "dirty-sample", "-o", "dirty")
    assert code == 0 and (tmp_path / "dirty" / "page-3.jsonl").exists()
    code, stdout, _ = tnllm("data", "inspect", "dirty-sample", "--json")
    named = json.loads(stdout)
    assert code == 0 and named["documents"] == 1166 and named["bad_documents"] == 3
    code, stdout, _ = tnllm("data", "inspect", "dirty", "--json")
    assert code == 0 and json.loads(stdout)["documents"] == 1166
    code, stdout, _ = tnllm("data", "dedup", "dirty-sample", "-o", "unique", "--threshold", "1", "--json")
    assert code == 0 and json.loads(stdout)["documents_in"] == 1169
    code, stdout, _ = tnllm("data", "tokenize", "dirty-sample", "-o", "tokens", "--on-error", "skip")
    assert code == 0 and "0 empty and 3 bad documents" in stdout


def test_a_file_of_the_sample_s_name_needs_a_path(tnllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dirty-sample").mkdir()
    (tmp_path / "dirty-sample" / "mine.jsonl").write_text('{"text": "mine"}\n')
    code, stdout, stderr = tnllm("data", "inspect", "./dirty-sample", "--json")
    assert (code, stderr) == (0, "") and json.loads(stdout)["documents"] == 1
    code, stdout, stderr = tnllm("data", "inspect", "dirty-sample", "--json")
    assert code == 0 and json.loads(stdout)["documents"] == 1166
    assert "dirty-sample means the corpus that ships; write ./dirty-sample for the one in this folder" in stderr


def test_scores_never_replace_their_input(tnllm, corpus, tmp_path):
    before = corpus.read_bytes()
    code, _, stderr = tnllm("data", "score", corpus, "-o", corpus)
    assert code == 2 and f"--out is {corpus}, which is also the input" in stderr
    code, _, stderr = tnllm("data", "dedup", corpus, "-o", tmp_path / "out", "--pairs", corpus)
    assert code == 2 and f"--pairs is {corpus}, which is also the input" in stderr
    assert corpus.read_bytes() == before and not (tmp_path / "out").exists()
