import json

import pytest

from tests.cleaning.texts import CHINESE, ENGLISH
from tnllm.cleaning import score
from tnllm.cleaning.score import score_texts
from tnllm.cli.data_clean import separation
from tnllm.errors import UserError
from tnllm.generation import scoring


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "web.jsonl"
    texts = [ENGLISH, ENGLISH + " Amen.", CHINESE, "Home | About | Contact", "a b c", ""]
    lines = [json.dumps({"id": f"d{n}", "text": text, "label": int(n < 3)}) for n, text in enumerate(texts)]
    path.write_text("\n".join([*lines, "junk"]) + "\n")
    return path


@pytest.mark.slow
def test_clean_and_inspect(tnllm, corpus, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = tnllm("data", "clean", corpus, "-o", out, "--workers", "1", "--set", "output.tally_field=label")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in stdout.splitlines()}
    assert lines["read"][1:3] == ["7", "5"] and lines["dedup"][1:3] == ["3", "2"]
    assert f"{corpus}:7: invalid JSON" in stdout
    assert stdout.splitlines()[-1].startswith(f"{out}/clean: 2 documents in ")
    code, again, _ = tnllm("data", "clean", corpus, "-o", out, "--workers", "1", "--set", "output.tally_field=label")
    assert code == 0 and again.splitlines()[:-1] == stdout.splitlines()[:-1]

    code, stdout, _ = tnllm("data", "inspect", out, "--reason", "near duplicate")
    assert code == 0 and stdout.startswith("d1  ") and '"of": "d0"' in stdout and "Fellow-Citizens" in stdout
    code, stdout, _ = tnllm("data", "inspect", out, "--json")
    assert code == 0 and json.loads(stdout)["documents_out"] == 2
    code, _, stderr = tnllm("data", "inspect", out, "--reason", "ugly")
    assert code == 2 and "nothing was rejected for 'ugly'; there are: " in stderr and "read: empty (1)" in stderr

    code, stdout, _ = tnllm("data", "tokenize", out / "clean", "-o", tmp_path / "tokens")
    assert code == 0 and "train " in stdout


def test_dedup_lists_pairs_and_compares_with_labels(tnllm, corpus, tmp_path):
    (tmp_path / "truth.tsv").write_text("id1\tid2\tjaccard\nd1\td0\t0.98\nd0\td2\t0.9\nd3\td4\t0.5\n")
    command = ["data", "dedup", corpus, "-o", tmp_path / "out", "--pairs", tmp_path / "p.tsv", "--workers", "1"]
    code, stdout, _ = tnllm(*command, "--truth", tmp_path / "truth.tsv")
    assert code == 0
    assert "2 labelled pairs, 1 found, 1 right; precision 1.0000, recall 0.5000" in stdout
    a, b, similarity = (tmp_path / "p.tsv").read_text().split()
    assert (a, b) == ("d0", "d1") and 0.95 < float(similarity) < 1


@pytest.mark.slow
def test_score(tnllm, corpus, tmp_path):
    code, stdout, stderr = tnllm("data", "score", corpus, "--label-field", "label", "--device", "cpu")
    rows = {row["id"]: row for row in map(json.loads, stdout.splitlines())}
    assert code == 0 and list(rows) == ["d0", "d1", "d2", "d3", "d4"]
    assert f"left out: {corpus}:7: invalid JSON" in stderr and "% of pairs" in stderr
    assert rows["d0"]["bytes"] > 800 and rows["d0"]["bits_per_byte"] < rows["d3"]["bits_per_byte"]
    code, stdout, _ = tnllm("data", "score", corpus, "-o", tmp_path / "s.jsonl", "--device", "cpu")
    assert (code, stdout) == (0, "")
    assert [json.loads(line)["id"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == list(rows)


def test_separation_is_the_area_under_the_curve():
    assert separation([(1.0, 1), (2.0, 1), (2.0, 0), (3.0, "0"), (9.0, None)]) == (1 + 1 + 0.5 + 1) / 4
    with pytest.raises(UserError, match="--label-field needs"):
        separation([(1.0, 1)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["clean", "CORPUS"], "no --out is given"),
        (["clean", "-o", "OUT"], "no input is given; name files or folders"),
        (["clean", "nowhere.txt", "-o", "OUT"], "no such file or folder: nowhere.txt"),
        (["clean", "nowhere.yaml", "-o", "OUT"], "no cleaning recipe nowhere.yaml"),
        (["clean", "a.yaml", "b.yaml", "-o", "OUT"], "2 recipes are given (a.yaml, b.yaml); name one"),
        (["clean", "CORPUS", "-o", "OUT", "--set", "dedup.treshold=1"], "did you mean 'dedup.threshold'? (--set)"),
        (["clean", "CORPUS", "-o", "OUT", "--executor", "slurm"], "there is no sbatch on this machine"),
        (
            ["clean", "CORPUS", "-o", "OUT", "--set", "input.on_error=stop", "--workers", "1"],
            "web.jsonl:7: invalid JSON",
        ),
        (["dedup", "CORPUS", "-o", "OUT", "--threshold", "2"], "--threshold is 2.0: input should be less than"),
        (["dedup", "CORPUS", "-o", "OUT", "--truth", "nowhere.tsv"], "--truth is nowhere.tsv, which cannot be read"),
        (["inspect", "CORPUS", "--reason", "rules"], "--reason is for the folder of a cleaning run"),
        (["self-clean", "CORPUS", "-o", "OUT", "--set", "self_clean.rounds=0"], "self_clean.rounds is 0"),
    ],
)
def test_what_is_wrong_is_one_line(tnllm, corpus, tmp_path, args, message):
    places = {"CORPUS": corpus, "OUT": tmp_path / "out"}
    code, stdout, stderr = tnllm("data", *[places.get(arg, arg) for arg in args])
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1 and stderr.startswith("tnllm: ") and message in stderr


def test_a_stopped_score_continues_and_gives_the_same_file(tnllm, corpus, tmp_path, monkeypatch):
    """Short and long documents in batches of 200 tokens; Ctrl-C after every third document."""
    texts = [ENGLISH, "a b c", CHINESE, "Home | About"] * 3
    corpus.write_text("".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)))
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 200)
    command = ("data", "score", corpus, "--label-field", "label", "--device", "cpu", "-o")
    code, _, whole = tnllm(*command, tmp_path / "whole.jsonl")

    def stopped(*args, **options):
        for number, result in enumerate(score_texts(*args, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(score, "score_texts", stopped)
    codes = []
    while not codes or codes[-1] == 130:
        code, stdout, stderr = tnllm(*command, tmp_path / "out.jsonl")
        codes.append(code)
        assert code == 0 or stderr.splitlines()[-1] == "tnllm: stopped by Ctrl-C"
        assert (tmp_path / "out.jsonl").exists() == (code == 0) and stdout == ""
    assert len(codes) > 2 and codes[-1] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert stderr.splitlines()[-1] == whole.splitlines()[-1] and not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("command", ["clean", "dedup", "score", "self-clean"])
def test_help_ends_with_an_example(tnllm, command):
    code, stdout, _ = tnllm("data", command, "--help")
    assert code == 0 and "Examples:" in stdout and f"tnllm data {command} " in stdout


def test_every_key_is_shown(tnllm):
    code, stdout, _ = tnllm("data", "clean", "--keys")
    assert code == 0 and "threshold: 0.8" in stdout and "dup_5gram" in stdout


def test_pairs_never_replace_an_input_and_a_bad_truth_stops_before_the_work(tnllm, tmp_path):
    """A file in an input folder, by its other name; labelled pairs that are none."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "hard.jsonl").hardlink_to(folder / "a.jsonl")
    (tmp_path / "words.tsv").write_text("a b x\n")
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe")
    for option, message in (
        (["--pairs", folder / "a.jsonl"], "which is also the input"),
        (["--pairs", tmp_path / "hard.jsonl"], "which is also the input"),
        (["--truth", tmp_path / "words.tsv"], "words.tsv:1: 'a b x'; expected two ids"),
        (["--truth", tmp_path / "bytes.tsv"], "which is not UTF-8 text"),
        (["--truth", folder], "which cannot be read"),
    ):
        code, _, stderr = tnllm("data", "dedup", folder, "-o", tmp_path / "out", *option)
        assert code == 2 and message in stderr
    assert not (tmp_path / "out").exists()
    assert (folder / "a.jsonl").read_text() == '{"text": "one two three"}\n'
