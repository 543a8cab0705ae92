"""Corpora at URLs: a plain HTTP server with ETags, fsspec's memory storage, and file://."""

import gzip
import json

import fsspec
import pytest

from tests.web import serving
from tnllm import assets
from tnllm.data import remote
from tnllm.data.corpus import find_files
from tnllm.data.encode import Options
from tnllm.data.remote import find_sources, is_remote, local_copy
from tnllm.data.shards import TokenStream, read_manifest
from tnllm.data.tokenize import prepare, tokenize_corpus
from tnllm.errors import MissingExtra, RunError, UserError
from tnllm.tokenizer import Tokenizer


def lines(first, count):
    return "".join(
        json.dumps({"text": f"Document {n} of the corpus. " * 20}) + "\n" for n in range(first, first + count)
    )


FILES = {"a.jsonl": lines(0, 30).encode(), "b.jsonl.gz": gzip.compress(lines(30, 30).encode()), "notes.json": b"{}"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(assets.tokenizer_model(None))


@pytest.fixture
def corpus(tmp_path):
    """The same files on this machine."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def server():
    with serving(FILES) as server:
        yield server


def same_shards(first, second):
    a, b = read_manifest(first), read_manifest(second)
    assert a.shards == b.shards
    assert a.total("tokens") > 1000


def test_every_kind_of_source_gives_the_same_shards(tmp_path, corpus, server, tokenizer):
    options = Options(val_fraction=0.1)
    tokenize_corpus(find_files([corpus]), tmp_path / "local", tokenizer, options, workers=1)
    storage = fsspec.filesystem("memory")
    for name, data in FILES.items():
        storage.pipe_file(f"/corpus/{name}", data)
    for number, source in enumerate(
        (server.url, "memory://corpus/", "memory://corpus", "memory://corpus/*.jsonl*", corpus.as_uri())
    ):
        out = tmp_path / str(number)
        tokenize_corpus(find_sources([source]), out, tokenizer, options, workers=1, shard_tokens=10**9)
        same_shards(out, tmp_path / "local")
        assert not list(out.glob("*.tmp-*")), "no copy is left"
    single = [f"{server.url}a.jsonl", f"{server.url}b.jsonl.gz"]
    tokenize_corpus(find_sources(single), tmp_path / "single", tokenizer, options, workers=2)
    same_shards(tmp_path / "single", tmp_path / "local")
    inputs = read_manifest(tmp_path / "single").inputs
    assert [item["file"] for item in inputs] == single
    assert inputs[0]["version"].startswith("ETag ")
    assert inputs[0]["bytes"] == len(FILES["a.jsonl"])


def test_a_stopped_run_resumes_exactly_and_fetches_only_what_is_left(tmp_path, corpus, server, tokenizer, monkeypatch):
    tokenize_corpus(find_files([corpus]), tmp_path / "local", tokenizer, workers=1, shard_tokens=500)
    sources, out = find_sources([server.url]), tmp_path / "out"
    del server.files["b.jsonl.gz"]
    with pytest.raises(UserError, match=r"there is nothing at http://.*/b.jsonl.gz"):
        tokenize_corpus(sources, out, tokenizer, workers=1, shard_tokens=500)
    server.files, server.requests = dict(FILES), []
    tokenize_corpus(find_sources([server.url]), out, tokenizer, workers=1, shard_tokens=500)
    assert [path for path in server.requests if path != "/"] == ["/b.jsonl.gz"]
    for split in "train", "val":
        first, second = (TokenStream.open(folder, split) for folder in (out, tmp_path / "local"))
        assert first.num_tokens == second.num_tokens
        assert (first.read(0, first.num_tokens) == second.read(0, second.num_tokens)).all()


@pytest.mark.parametrize("how", ["etag", "date"])
def test_a_file_that_changed_is_refused(tmp_path, server, tokenizer, how):
    """Between the listing and the transfer, and between a run and the next one."""
    server.etags, server.dates = how == "etag", 1e9
    sources, out = find_sources([f"{server.url}a.jsonl"]), tmp_path / "out"
    other = FILES["a.jsonl"].replace(b"Document 7 ", b"Document X ")
    assert len(other) == len(FILES["a.jsonl"])
    server.files["a.jsonl"], server.dates = other, 1.1e9
    with pytest.raises(RunError, match=r"a.jsonl changed since it was found: it was (ETag|Last-Modified) .*, and is "):
        tokenize_corpus(sources, out, tokenizer, workers=1)
    with pytest.raises(UserError, match=r"another content of http://.*a.jsonl \(.*bytes, .*, now .*\); choose another"):
        tokenize_corpus(find_sources([f"{server.url}a.jsonl"]), out, tokenizer, workers=1)


def test_a_recipe_may_name_a_url(tmp_path, corpus, server, tokenizer):
    folder = prepare(server.url, tokenizer, tmp_path / "cache", workers=1)
    same_shards(folder, prepare(corpus, tokenizer, tmp_path / "cache", workers=1))
    assert prepare(server.url, tokenizer, tmp_path / "cache") == folder
    server.files["c.jsonl"] = lines(90, 1).encode()
    with pytest.raises(UserError, match=rf"{folder} was made with 2 input files \(now 3\); remove that folder"):
        prepare(server.url, tokenizer, tmp_path / "cache")


def test_what_is_here_completely_needs_no_network(tmp_path, corpus, tokenizer, monkeypatch, capsys):
    storage = fsspec.filesystem("memory")
    storage.pipe_file("/one/a.jsonl", FILES["a.jsonl"])
    folder = prepare("memory://one/a.jsonl", tokenizer, tmp_path, workers=1)

    def unreachable(*_, **__):
        raise OSError("the network is down")

    monkeypatch.setattr(type(storage), "info", unreachable)
    assert prepare("memory://one/a.jsonl", tokenizer, tmp_path) == folder
    assert "the network is down; all of it was tokenized before" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"memory://two/a.jsonl cannot be read: the network is down"):
        prepare("memory://two/a.jsonl", tokenizer, tmp_path)


def test_a_broken_transfer_is_tried_again(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    [file] = find_sources([f"{server.url}a.jsonl"])
    server.faults = ["cut", "cut"]
    with local_copy(file, tmp_path) as path:
        assert path.read_bytes() == FILES["a.jsonl"]
    assert capsys.readouterr().err.count("; trying again") == 2
    server.faults = ["cut"] * 99
    with pytest.raises(RunError, match=r"^http://.*/a.jsonl cannot be read: "), local_copy(file, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


# Requests ask for the file's state, the file, and its state again; after a failure fsspec asks twice.
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("fault", [500, 503, 403, 429, "drop", "redirect"])
def test_a_server_that_fails_once_is_asked_again(tmp_path, server, monkeypatch, fault, before):
    """At any of the requests that a file takes, its listing included."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server.faults = ["fine"] * before + [fault, fault]
    [file] = find_sources([f"{server.url}a.jsonl"])
    with local_copy(file, tmp_path) as path:
        assert path.read_bytes() == FILES["a.jsonl"]
    assert fault in server.failed


@pytest.mark.parametrize(("fault", "error"), [(500, RunError), (403, RunError), (404, UserError), ("drop", RunError)])
def test_a_server_that_goes_on_failing_is_one_line(tmp_path, server, monkeypatch, fault, error):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    [file] = find_sources([f"{server.url}a.jsonl"])
    server.faults = [fault] * 99
    with pytest.raises(error, match=r"http://.*/a.jsonl") as raised, local_copy(file, tmp_path):
        pass
    assert type(raised.value) is error and list(tmp_path.iterdir()) == []


def test_messages_name_the_url(tmp_path, server, tokenizer, capsys):
    server.files["bad.jsonl"] = b'{"text": "fine"}\n{"txt": 1}\n'
    url = f"{server.url}bad.jsonl"
    with pytest.raises(UserError, match=rf"^{url}:2: no field 'text'"):
        tokenize_corpus(find_sources([url]), tmp_path / "a", tokenizer, workers=1)
    tokenize_corpus(find_sources([url]), tmp_path / "b", tokenizer, workers=1, on_error="skip")
    assert f"left out: {url}:2: no field" in capsys.readouterr().err
    server.files["cut.jsonl.gz"] = FILES["b.jsonl.gz"][:-20]
    with pytest.raises(RunError, match=rf"^{server.url}cut.jsonl.gz"):
        tokenize_corpus(find_sources([f"{server.url}cut.jsonl.gz"]), tmp_path / "c", tokenizer, workers=1)


def test_mistakes_in_urls(server, monkeypatch):
    for url, error, message in (
        (f"{server.url}none.jsonl", UserError, "there is nothing at http://"),
        (f"{server.url}notes.pdf", UserError, "there is nothing at|not in a known corpus format"),
        ("nosuch://x/y.jsonl", UserError, r"nosuch://x/y.jsonl: .*; allowed are http\(s\)://, hf://"),
        ("memory://empty/", UserError, "holds no corpus file|there is nothing at"),
        ("http://127.0.0.1:9/a.jsonl", RunError, "http://127.0.0.1:9/a.jsonl cannot be read: "),
    ):
        with pytest.raises(error, match=message):
            find_sources([url])
    with pytest.raises(UserError, match="is given twice"):
        find_sources([f"{server.url}a.jsonl"] * 2)


def test_a_storage_without_its_package_names_the_extra(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"this needs s3fs, .*pip install 'tnllm\[remote\]'"):
        find_sources(["s3://bucket/a.jsonl"])


def test_what_a_url_is():
    assert all(map(is_remote, ("https://x/y", "hf://datasets/a/b", "S3://b", "memory://x")))
    assert not any(map(is_remote, ("corpus/a.jsonl", "file:///x", "FILE:///x", "sample")))
