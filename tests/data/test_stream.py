"""Sources that are tokenized while training reads them: the same rows after any stop, within a bounded disk."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from tests.web import serving
from tnllm import assets
from tnllm.data import remote
from tnllm.data.encode import Options
from tnllm.data.loader import Loader, Source
from tnllm.data.remote import read_documents
from tnllm.data.stream import INDEX, ChunkStream
from tnllm.errors import RunError, UserError
from tnllm.tokenizer import Tokenizer

SEQ_LEN = 32
OPTIONS = Options(val_fraction=0.1)
# 8 chunks of 625 tokens of 2 bytes: 19 rows of 32 tokens each.
DISK_BYTES = 10_000


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(assets.tokenizer_model(None))


@pytest.fixture
def corpus(tmp_path):
    """Three files, of which one holds a single long document and one short ones: about 3,000 tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def line(words):
        return json.dumps({"text": " ".join(f"w{n}" for n in rng.integers(0, 1000, words))}) + "\n"

    (folder / "a.jsonl").write_text("".join(line(20) for _ in range(20)))
    (folder / "b.jsonl").write_text(line(400))
    (folder / "c.jsonl").write_text("".join(line(1) for _ in range(60)))
    return folder


@pytest.fixture
def opened():
    """Opens streams and closes them at the end."""
    streams = []

    def open_stream(source, folder, tokenizer, disk_bytes=DISK_BYTES, seed=0, workers=1, options=OPTIONS):
        streams.append(ChunkStream(str(source), folder, tokenizer, options, SEQ_LEN, disk_bytes, seed, workers))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def closed(stream):
    stream.close()
    if stream._thread is not None:
        stream._thread.join()


def rows_of(stream, first, count):
    return Loader([Source(stream)], SEQ_LEN, 2).batch(first, count)


def same(a, b):
    return all(torch.equal(x, y) for x, y in ((a.tokens, b.tokens), (a.labels, b.labels), (a.cu_seqlens, b.cu_seqlens)))


def is_held_out(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < int(OPTIONS.val_fraction * 2**64)


def expected(stream, tokenizer, epochs):
    """Tokens and starts of documents of the stream, encoded one by one."""
    parts, starts = [], []
    for epoch in range(epochs):
        for document in read_documents([Path(file.url) for file in stream.order(epoch)]):
            if not is_held_out(document.text):
                starts.append(sum(map(len, parts)))
                parts.append(tokenizer.encode(document.text, eos=True))
    return np.concatenate(parts), np.array(starts)


def test_the_stream_is_every_pass_in_its_order(tmp_path, corpus, tokenizer, opened):
    stream = opened(corpus, tmp_path / "run", tokenizer)
    tokens, starts = expected(stream, tokenizer, 3)
    assert stream.num_tokens == 19 * SEQ_LEN
    assert len(tokens) > 9 * stream.num_tokens
    for start in range(0, 9 * stream.num_tokens, SEQ_LEN):
        assert stream.read(start, SEQ_LEN + 1).tolist() == tokens[start : start + SEQ_LEN + 1].tolist()
        inner = starts[(starts > start) & (starts <= start + SEQ_LEN)] - start
        ours = stream.document_starts(start, SEQ_LEN + 1)
        assert ours[ours > 0].tolist() == inner.tolist()
    assert stream.order(0) != stream.order(1) or stream.order(1) != stream.order(2)
    # Validation has what is held out of the first pass up to the end of chunk 0, or of its group.
    held_out = stream.validation()
    documents = read_documents([Path(file.url) for file in stream.order(0)])
    texts = [document.text for document in documents if is_held_out(document.text)]
    decoded = [tokenizer.decode(held_out.document(n)[:-1].tolist()) for n in range(held_out.num_documents)]
    assert 0 < len(decoded) <= len(texts)
    assert decoded == texts[: len(decoded)]


def test_batches_do_not_depend_on_disk_workers_or_a_stop(tmp_path, corpus, tokenizer, opened):
    whole = rows_of(opened(corpus, tmp_path / "a", tokenizer), 0, 150)
    assert same(rows_of(opened(corpus, tmp_path / "b", tokenizer, workers=2), 0, 150), whole)
    first = opened(corpus, tmp_path / "c", tokenizer)
    rows_of(first, 0, 41)
    saved = Loader([Source(first)], SEQ_LEN, 2).positions(40)
    assert saved[0]["chunk"] == 2
    closed(first)
    # The same folder again, and from a checkpoint without its folder.
    assert torch.equal(rows_of(opened(corpus, tmp_path / "c", tokenizer), 100, 50).tokens[0], whole.tokens[0, 3200:])
    fresh = opened(corpus, tmp_path / "d", tokenizer)
    resumed = Loader([Source(fresh)], SEQ_LEN, 2)
    resumed.restore(saved)
    assert resumed.positions(40) == saved, "a second checkpoint in the same chunk knows it too"
    assert torch.equal(rows_of(fresh, 40, 110).tokens[0], whole.tokens[0, 40 * SEQ_LEN :])
    # A position that is not the right one shows that reading begins there.
    moved = opened(corpus, tmp_path / "f", tokenizer)
    moved.restore(saved[0] | {"chunk": 5000})
    assert moved.read(5000 * moved.num_tokens, 9).tolist() == fresh.read(2 * fresh.num_tokens, 9).tolist()
    other = rows_of(opened(corpus, tmp_path / "e", tokenizer, seed=1), 0, 150)
    assert not torch.equal(other.tokens, whole.tokens)


def test_the_disk_is_bounded_and_earlier_chunks_can_be_had_again(tmp_path, corpus, tokenizer, opened):
    stream = opened(corpus, tmp_path / "run", tokenizer)
    whole = [rows_of(stream, row, 1).tokens for row in range(0, 30 * stream.rows, 7)]
    closed(stream)
    sizes = [path.stat().st_size for path in stream.folder.glob("train-*")]
    assert sum(sizes) <= DISK_BYTES
    assert len(sizes) < 2 * 12
    again = opened(corpus, tmp_path / "run", tokenizer)
    assert torch.equal(rows_of(again, 0, 1).tokens, whole[0])
    assert torch.equal(rows_of(again, 7 * 80, 1).tokens, whole[80])
    closed(again)
    for path in stream.folder.glob("train-*"):
        path.unlink()
    assert torch.equal(rows_of(opened(corpus, tmp_path / "run", tokenizer), 7 * 50, 1).tokens, whole[50])


def test_a_killed_process_leaves_what_another_one_continues(tmp_path, corpus, tokenizer, opened):
    script = """
import os, sys
from pathlib import Path
from tnllm import assets
from tnllm.data.encode import Options
from tnllm.data.stream import ChunkStream
from tnllm.tokenizer import Tokenizer
tokenizer = Tokenizer.load(assets.tokenizer_model(None))
stream = ChunkStream(sys.argv[1], Path(sys.argv[2]), tokenizer, Options(val_fraction=0.1), 32, 10_000, 0, 1)
stream.read(4 * stream.num_tokens, 33)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "run")]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == -9
    left = opened(corpus, tmp_path / "run", tokenizer)
    assert (left.folder / INDEX).is_file()
    # The next process may run on another machine.
    (left.folder / ".lock").write_text('{"host": "gone", "boot": "1", "pid": 1}')
    assert same(rows_of(left, 60, 60), rows_of(opened(corpus, tmp_path / "other", tokenizer), 60, 60))


def test_a_process_that_ends_without_closing_ends_cleanly(tmp_path, corpus):
    """Its thread may be in the middle of the tokenizer."""
    script = """
import sys
from pathlib import Path
from tnllm import assets
from tnllm.data.encode import Options
from tnllm.data.stream import ChunkStream
from tnllm.tokenizer import Tokenizer
tokenizer = Tokenizer.load(assets.tokenizer_model(None))
stream = ChunkStream("sample", Path(sys.argv[1]), tokenizer, Options(), 32, 10_000_000, 0, 1)
stream.read(0, 33)
sys.exit(7)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert (ended.returncode, "terminate" in ended.stderr) == (7, False), ended.stderr


def test_two_ranks_share_one_folder(tmp_path, corpus, tokenizer, opened):
    whole = rows_of(opened(corpus, tmp_path / "alone", tokenizer), 0, 120).tokens.reshape(-1, SEQ_LEN)
    streams = [opened(corpus, tmp_path / "run", tokenizer) for _ in range(2)]
    loaders = [Loader([Source(s)], SEQ_LEN, 4, rank=rank, world_size=2) for rank, s in enumerate(streams)]
    results = [[], []]

    for step in range(30):
        for rank in (0, 1):
            rows = loaders[rank].rank_samples(4 * step)
            results[rank].append(loaders[rank].batch(rows.start, 2).tokens.reshape(2, SEQ_LEN))
        assert torch.equal(torch.cat([results[0][-1], results[1][-1]]), whole[4 * step : 4 * step + 4])
    # If the one that writes ends, the other takes over.
    writer = next(s for s in streams if s._thread is not None)
    other = streams[1 - streams.index(writer)]
    closed(writer)
    assert len(other.read(40 * other.num_tokens, 3)) == 3


def test_a_file_that_changed_is_refused(tmp_path, corpus, tokenizer, opened):
    stream = opened(corpus, tmp_path / "run", tokenizer)
    stream.read(0, 5)
    changed = corpus / "a.jsonl"
    times = changed.stat().st_mtime_ns
    changed.write_text(changed.read_text())
    os.utime(changed, ns=(times, times + 10**9))
    with pytest.raises(RunError, match=r"a.jsonl changed since it was found: it was mtime \d+, .* bytes, and is mtime"):
        stream.read(60 * stream.num_tokens, 5)
    with pytest.raises(UserError, match=r"another content of .*a.jsonl \(.*, mtime \d+, now .*\); remove that folder"):
        opened(corpus, tmp_path / "run", tokenizer)


def test_a_url_is_the_same_as_its_files(tmp_path, corpus, tokenizer, opened):
    storage = fsspec.filesystem("memory")
    for path in corpus.iterdir():
        storage.pipe_file(f"/stream/{path.name}", path.read_bytes())
    web = opened("memory://stream/", tmp_path / "remote", tokenizer)
    local = opened(corpus.as_uri(), tmp_path / "local", tokenizer)
    assert same(rows_of(web, 0, 100), rows_of(local, 0, 100))
    closed(web)
    assert not list(web.folder.glob("*.tmp-*"))


def test_a_web_server_with_faults_gives_the_rows_of_its_files(tmp_path, corpus, tokenizer, opened, monkeypatch):
    """Transfers that break off, refused and redirected requests; then a stop, and another machine without the chunks."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    local = opened(corpus, tmp_path / "local", tokenizer)
    whole, later = rows_of(local, 0, 150), rows_of(local, 100, 50)
    with serving({path.name: path.read_bytes() for path in corpus.iterdir()}) as server:
        stream = opened(server.url, tmp_path / "remote", tokenizer)
        server.faults = ["cut", 500, "redirect", "drop", 403, "cut", 503, "redirect"]
        assert same(rows_of(stream, 0, 150), whole)
        assert server.faults == []
        saved = Loader([Source(stream)], SEQ_LEN, 2).positions(100)
        closed(stream)
        again = opened(server.url, tmp_path / "elsewhere", tokenizer)
        loader = Loader([Source(again)], SEQ_LEN, 2)
        loader.restore(saved)
        server.faults = ["redirect", "cut"]
        assert same(loader.batch(100, 50), later)
        closed(again)


def test_a_file_that_changed_on_its_server_is_refused(tmp_path, corpus, tokenizer, opened, monkeypatch):
    """In the run that listed it, in a run that takes up its folder, and not before its bytes are needed."""
    with serving({path.name: path.read_bytes() for path in corpus.iterdir()}) as server:
        stream = opened(server.url, tmp_path / "run", tokenizer)
        stream.read(0, 5)
        server.files["a.jsonl"] = server.files["a.jsonl"].replace(b"w1", b"w2")
        with pytest.raises(RunError, match=r"http://.*a.jsonl changed since it was found: it was ETag .*, and is ETag"):
            stream.read(60 * stream.num_tokens, 5)
        closed(stream)
        with pytest.raises(UserError, match=r"another content of http://.*a.jsonl \(.*ETag.*\); remove that folder"):
            opened(server.url, tmp_path / "run", tokenizer)


def test_bad_records_are_left_out_and_named(tmp_path, corpus, tokenizer, opened, capsys):
    whole = rows_of(opened(corpus, tmp_path / "run", tokenizer), 0, 20)
    text = (corpus / "a.jsonl").read_text()
    (corpus / "a.jsonl").write_text(text + '{"txt": 1}\n')
    assert same(rows_of(opened(corpus, tmp_path / "again", tokenizer), 0, 20), whole)
    assert "a.jsonl:21: no field 'text'" in capsys.readouterr().err


def test_what_cannot_be_is_said(tmp_path, corpus, tokenizer, opened):
    with pytest.raises(UserError, match=r"1e-07 GB hold no row in each of 8 chunks; give 5.12e-07 GB or more"):
        opened(corpus, tmp_path / "a", tokenizer, disk_bytes=100)
    stream = opened(corpus, tmp_path / "b", tokenizer)
    with pytest.raises(UserError, match=r"a step of 20 rows is more than a chunk of .*, 19 rows; raise data.stream_gb"):
        Loader([Source(stream)], SEQ_LEN, 20)
    with pytest.raises(UserError, match="give each of the 2 sources a weight"):
        Loader([Source(stream), Source(stream)], SEQ_LEN, 2)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="holds no text to train on in 1 files"):
        opened(empty, tmp_path / "c", tokenizer).validation()
