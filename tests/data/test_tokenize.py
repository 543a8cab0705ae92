import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tnllm import assets, files
from tnllm.data import encode, tokenize
from tnllm.data.encode import Options
from tnllm.data.remote import read_documents
from tnllm.data.shards import MANIFEST, TokenStream, read_manifest, verify_hashes
from tnllm.data.tokenize import prepare, tokenize_corpus
from tnllm.errors import RunError, UserError
from tnllm.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.load(assets.tokenizer_model())
ROOT = Path(__file__).parents[2]


def texts(count=120, seed=0) -> list[str]:
    draw = random.Random(seed)
    words = ["the", "king", "had", "three", "sons", "从前", "有", "一个", "国王", "\n", "2024", "😀"]
    return [" ".join(draw.choices(words, k=draw.randrange(5, 60))) + str(i) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[Path]:
    """Two files that make a dozen groups."""
    monkeypatch.setattr(encode, "_GROUP_CHARS", 1500)
    return [write_jsonl(tmp_path / "a.jsonl", texts()), write_jsonl(tmp_path / "b.jsonl", texts(60, seed=1))]


def documents(folder: Path, split: str = "train") -> list[str]:
    stream = TokenStream.open(folder, split, verify=True)
    return [TOKENIZER.decode(stream.document(i).tolist()) for i in range(stream.num_documents)]


def ids(folder: Path, split: str = "train") -> list[int]:
    stream = TokenStream.open(folder, split)
    return stream.read(0, stream.num_tokens).tolist()


def hold_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < fraction * 2**64


def test_documents_come_back_split_by_their_hash(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = tokenize_corpus(corpus, out, TOKENIZER, Options(val_fraction=0.2))
    every = texts() + texts(60, seed=1)
    train, val = documents(out), documents(out, "val")
    # The very first document is always for training.
    assert train == [text for i, text in enumerate(every) if i == 0 or not hold_out(text, 0.2)]
    assert val == [text for text in every[1:] if hold_out(text, 0.2)] and len(val) > 15
    assert manifest.total("text_bytes") == sum(len(text.encode()) for text in every)
    stream = TokenStream.open(out, "val")
    assert all(stream.document(i)[-1] == TOKENIZER.eos_id for i in range(stream.num_documents))
    assert stream.token_bytes[stream.read(0, stream.num_tokens)].sum() == stream.text_bytes


def test_workers_and_shard_size_change_nothing_in_the_stream(corpus, tmp_path):
    tokenize_corpus(corpus, tmp_path / "one", TOKENIZER, workers=1)
    tokenize_corpus(corpus, tmp_path / "two", TOKENIZER, workers=2, shard_tokens=700)
    assert len(read_manifest(tmp_path / "two").shards) > 5
    for split in ("train", "val"):
        assert documents(tmp_path / "one", split) == documents(tmp_path / "two", split)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("after", [0, 2, 7])
def test_a_stopped_run_resumes(corpus, tmp_path, stop, after):
    options = Options(val_fraction=0.1)
    tokenize_corpus(corpus, tmp_path / "whole", TOKENIZER, options)
    seen = []

    def report(status):
        seen.append(status)
        if len(seen) > after:
            raise stop

    out = tmp_path / "out"
    with pytest.raises(stop):
        tokenize_corpus(corpus, out, TOKENIZER, options, shard_tokens=700, report=report)
    with pytest.raises(UserError, match="is not finished"):
        TokenStream.open(out)
    kept = read_manifest(out).total("tokens")
    # Ctrl-C keeps what was encoded; a crash keeps the shards that were written.
    assert kept == seen[-1].tokens if stop is KeyboardInterrupt else kept <= seen[-1].tokens
    tokenize_corpus(corpus, out, TOKENIZER, options)
    for split in ("train", "val"):
        assert documents(out, split) == documents(tmp_path / "whole", split)


def run_cli(corpus: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "tnllm", "data", "tokenize", str(corpus), "-o", str(out), "--shard-tokens", "50K"]


def test_workers_never_see_ctrl_c():
    """Blocked when they begin, so also while they import; the parent has it as before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with encode.ctrl_c_is_ours():
            blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert blocked.result() == before | {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_or_killed_leaves_complete_shards(tmp_path, sent, code):
    corpus = write_jsonl(tmp_path / "big.jsonl", texts(60) * 500)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*run_cli(corpus, out), "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (out / MANIFEST).exists() or not read_manifest(out).shards:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    # A terminal sends Ctrl-C to every process of the group; a kill takes them all as well.
    os.killpg(process.pid, sent)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    if sent == signal.SIGINT:
        assert stderr.splitlines()[-1] == "tnllm: stopped by Ctrl-C"
        assert "Traceback" not in stderr
    manifest = read_manifest(out)
    assert not manifest.complete and manifest.shards
    verify_hashes(out, manifest)
    done = subprocess.run(run_cli(corpus, out), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.tmp-*"))
    found = documents(out) + documents(out, "val")
    assert sorted(found) == sorted(texts(60) * 500)


def test_a_full_disk_is_one_line_and_loses_nothing(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real_open = open

    def full(path, mode="r"):
        return real_open("/dev/full" if "train-00002.bin.tmp" in str(path) else path, mode)

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(RunError) as error:
        tokenize_corpus(corpus, out, TOKENIZER, shard_tokens=700)
    assert str(error.value) == f"the disk of {out} is full; free some space and run the same again to resume"
    assert error.value.exit_code == 1
    manifest = read_manifest(out)
    assert [shard.file for shard in manifest.shards if shard.split == "train"] == ["train-00000.bin", "train-00001.bin"]
    verify_hashes(out, manifest)
    assert not list(out.glob("*00002*"))
    monkeypatch.undo()
    monkeypatch.setattr(encode, "_GROUP_CHARS", 1500)
    tokenize_corpus(corpus, out, TOKENIZER)
    tokenize_corpus(corpus, tmp_path / "whole", TOKENIZER)
    assert ids(out) == ids(tmp_path / "whole")


def test_a_lost_worker_is_one_line(corpus, tmp_path):
    def kill_workers(status):
        for child in multiprocessing.active_children():
            child.kill()

    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"a worker died \(out of memory\?\); run the same again, or with fewer --workers"
    ):
        tokenize_corpus(corpus, out, TOKENIZER, workers=2, report=kill_workers)
    assert not read_manifest(out).complete
    tokenize_corpus(corpus, out, TOKENIZER)
    tokenize_corpus(corpus, tmp_path / "whole", TOKENIZER)
    assert ids(out) == ids(tmp_path / "whole")


def test_finished_work_is_not_redone(corpus, tmp_path):
    out = tmp_path / "out"
    tokenize_corpus(corpus, out, TOKENIZER)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    calls = []
    tokenize_corpus(corpus, out, TOKENIZER, report=calls.append)
    assert not calls
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}


def test_what_changed_is_refused_and_redone_when_asked(corpus, tmp_path):
    out = tmp_path / "out"
    tokenize_corpus(corpus, out, TOKENIZER)
    other = tmp_path / "tokenizer.model"
    other.write_bytes(train_tokenizer(texts(), 325))

    def refused(match, files=corpus, tokenizer=TOKENIZER, options=None):
        with pytest.raises(UserError, match=match) as error:
            tokenize_corpus(files, out, tokenizer, options)
        assert str(error.value).endswith("; choose another folder or start again with --overwrite")

    refused(r"was made with another tokenizer \(sha256 ", tokenizer=Tokenizer.load(other))
    refused(r"was made with --val-fraction 0.01 \(now 0.5\)", options=Options(val_fraction=0.5))
    refused(r"was made with 2 input files \(now 1\)", files=corpus[:1])
    elsewhere = write_jsonl(tmp_path / "c.jsonl", ["elsewhere"])
    refused(r"was made with .*b.jsonl \([\d,]+ bytes\), not .*c.jsonl \(22 bytes\)", files=[corpus[0], elsewhere])
    write_jsonl(corpus[1], ["changed"])
    refused(r"was made with another content of .*b.jsonl \([\d,]+ bytes, now 20 bytes\)")
    tokenize_corpus(corpus, out, TOKENIZER, overwrite=True)
    assert "changed" in documents(out) + documents(out, "val")


def test_a_folder_with_other_files_is_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is not empty \(it holds thesis.txt\); choose a new folder"):
            tokenize_corpus(corpus, tmp_path / "out", TOKENIZER, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": " \\n"}\n'])
def test_an_empty_corpus_is_one_line(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    empty = content.count("\n")
    with pytest.raises(UserError) as error:
        tokenize_corpus([path], tmp_path / "out", TOKENIZER)
    assert str(error.value) == f"the corpus is empty: no text in 1 file, {empty} empty and 0 bad documents"
    assert not (tmp_path / "out").exists()


def test_bad_documents_stop_or_are_left_out_and_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "web.jsonl", ["one", "two"])
    path.write_text(path.read_text() + "junk\n" * 12 + '{"text": "three"}\n{"text": ""}\n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"web.jsonl:3: invalid JSON .*--on-error skip"):
        tokenize_corpus([path], out, TOKENIZER, Options(val_fraction=0))
    manifest = tokenize_corpus([path], out, TOKENIZER, Options(val_fraction=0), on_error="skip")
    assert manifest.skipped == {"empty": 1, "bad": 12}
    assert documents(out) == ["one", "two", "three"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"left out: {path}:3: invalid JSON")
    assert len(lines) == 11 and lines[-1] == "further ones are counted, not shown"


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_a_single_document_lends_its_end_to_validation(tmp_path, fraction):
    text = "\n".join(texts(50))
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    manifest = tokenize_corpus([path], tmp_path / "out", TOKENIZER, Options(val_fraction=fraction))
    total, held = manifest.total("tokens"), manifest.total("tokens", "val")
    assert held == max(2, round(total * fraction))
    assert ids(tmp_path / "out") + ids(tmp_path / "out", "val") == TOKENIZER.encode(text, eos=True)
    assert manifest.total("text_bytes") == len(text.encode())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin")) == [
        "token_bytes.bin",
        "train-00001.bin",
        "val-00000.bin",
    ]


def test_begin_tokens_and_large_vocabularies(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    tokenize_corpus([path], tmp_path / "out", TOKENIZER, Options(bos=True, val_fraction=0))
    stream = TokenStream.open(tmp_path / "out")
    assert stream.document(1).tolist() == TOKENIZER.encode("two", bos=True, eos=True)
    assert np.dtype(stream.manifest.dtype) == np.uint16


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_an_invalid_fraction_is_refused(corpus, tmp_path, fraction):
    with pytest.raises(UserError, match="give a share from 0 to below 1"):
        tokenize_corpus(corpus, tmp_path / "out", TOKENIZER, Options(val_fraction=fraction))


def test_prepare_makes_shards_once(corpus, tmp_path):
    cache = tmp_path / "cache"
    calls = []
    first = prepare(corpus[0], TOKENIZER, cache, report=calls.append)
    assert calls and first.parent == cache and first.name.startswith("a-")
    count = len(calls)
    assert prepare(corpus[0], TOKENIZER, cache, report=calls.append) == first and len(calls) == count
    assert prepare(first, TOKENIZER, cache) == first
    assert prepare(corpus[0], TOKENIZER, cache, Options(bos=True)) != first
    write_jsonl(corpus[0], ["other text"] * 3)
    assert prepare(corpus[0], TOKENIZER, cache) != first
    other = tmp_path / "tokenizer.model"
    other.write_bytes(train_tokenizer(texts(), 325))
    with pytest.raises(UserError, match=r"was made with another tokenizer than .*; use .*tokenizer.model or tokenize"):
        prepare(first, Tokenizer.load(other), cache)


@pytest.mark.slow
def test_processes_that_ask_at_once_share_the_work(tmp_path):
    corpus = write_jsonl(tmp_path / "big.jsonl", texts(60) * 200)
    code = (
        "import sys; from pathlib import Path; from tnllm import assets; from tnllm.tokenizer import Tokenizer\n"
        "from tnllm.data.tokenize import prepare\n"
        "print(prepare(sys.argv[1], Tokenizer.load(assets.tokenizer_model()), Path(sys.argv[2]), workers=1))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(corpus), str(tmp_path / "cache")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in both}
    assert len(folders) == 1
    assert TokenStream.open(folders.pop(), verify=True).num_tokens > 0


def test_the_sample_ships_and_is_what_its_notice_says(tmp_path):
    found = list(read_documents([assets.sample_corpus()]))
    assert len(found) == 7056
    assert sum(len(document.text.encode()) for document in found) == 11_188_741
    assert {document.record["lang"] for document in found} == {"en", "zh"}
    terms = {document.record["license"] for document in found}
    assert terms == {"public domain", "MIT", "MIT (texts public domain)"}
    assert tokenize.SAMPLE == "sample"
    notice = (assets.folder() / "NOTICE").read_text()
    assert "7,056 documents (11,188,741 bytes" in notice
