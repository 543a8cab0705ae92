"""Data commands whose sources and outputs are URLs, with fsspec's memory storage."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from tests.cleaning.texts import CHINESE, ENGLISH
from tnllm.data.upload import begin_output, finish_output
from tnllm.errors import RunError, UserError
from tnllm.files import only_writer


@pytest.fixture
def storage(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    yield storage
    storage.store.clear()


@pytest.fixture
def corpus(storage, tmp_path):
    """The same two files here and at memory://web/."""
    folder = tmp_path / "web"
    folder.mkdir()
    texts = {"a.jsonl": [ENGLISH, CHINESE, "a b c"], "b.jsonl": [ENGLISH + " Amen.", "x " * 300]}
    for name, documents in texts.items():
        data = "".join(json.dumps({"text": text}) + "\n" for text in documents) + (
            "junk\n" if name == "a.jsonl" else ""
        )
        (folder / name).write_text(data)
        storage.pipe_file(f"/web/{name}", data.encode())
    return folder


def test_clean_reads_urls(tnllm, corpus, tmp_path):
    outputs = []
    for source, name in ((corpus, "local"), ("memory:///web/", "remote")):
        command = ["data", "clean", source, "-o", tmp_path / name, "--workers", "1"]
        code, stdout, _ = tnllm(*command)
        assert code == 0
        assert tnllm(*command)[0] == 0, "a finished run may be asked for again"
        steps = [line for line in stdout.splitlines() if line.split()[0] in ("read", "rules", "dedup")]
        outputs.append([line.split()[:3] for line in steps])
        assert f"{str(source).rstrip('/')}/a.jsonl:4: invalid JSON" in stdout
    assert outputs[0] == outputs[1]
    code, stdout, _ = tnllm("data", "inspect", tmp_path / "remote", "--reason", "near duplicate")
    assert stdout.startswith("memory:///web/b.jsonl:1  {") and '"of": "memory:///web/a.jsonl:1"' in stdout


def test_a_source_that_changed_is_refused(tnllm, corpus, storage, tmp_path):
    command = ["data", "clean", "memory://web/", "-o", tmp_path / "out", "--workers", "1"]
    assert tnllm(*command)[0] == 0
    storage.pipe_file("/web/a.jsonl", (corpus / "a.jsonl").read_bytes().replace(b"junk", b"jank"))
    code, _, stderr = tnllm(*command)
    assert code == 2 and "was made with another content of memory:///web/a.jsonl" in stderr


def test_inspect_score_and_tokenizers_read_urls(tnllm, corpus, tmp_path):
    results = [json.loads(tnllm("data", "inspect", source, "--json")[1]) for source in (corpus, "memory://web/")]
    assert [bad.replace("memory:///web", str(corpus)) for bad in results[1].pop("bad")] == results[0].pop("bad")
    assert results[0] == results[1] and results[0]["documents"] == 5
    options = ["--vocab-size", "440", "--on-error", "skip"]
    for source, name in ((corpus, "a"), ("memory://web/", "b")):
        assert tnllm("tokenizer", "train", source, "-o", tmp_path / name, *options)[0] == 0
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert "bytes_per_token" in tnllm("tokenizer", "inspect", "--file", "memory://web/b.jsonl")[1]


def test_outputs_may_be_urls(tnllm, corpus, storage, tmp_path):
    code, stdout, _ = tnllm("data", "tokenize", "memory://web/b.jsonl", "-o", "memory://out/tokens")
    assert code == 0 and "memory://out/tokens: " in stdout
    assert tnllm("data", "tokenize", corpus / "b.jsonl", "-o", tmp_path / "tokens")[0] == 0
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert sorted(Path(name).name for name in storage.find("/out/tokens")) == names
    for name in names:
        if name != "manifest.json":
            assert storage.cat(f"/out/tokens/{name}") == (tmp_path / "tokens" / name).read_bytes()
    code, _, stderr = tnllm("data", "tokenize", "memory://web/b.jsonl", "-o", "memory://out/tokens")
    assert code == 2 and "memory://out/tokens holds files already" in stderr

    assert tnllm("data", "clean", corpus, "-o", "memory://out/clean", "--workers", "1")[0] == 0
    names = {name.removeprefix("/out/clean/") for name in storage.find("/out/clean")}
    assert {"report.json", "recipe.json", "clean/00000.jsonl.gz"} <= names
    assert not any(name.startswith(("work", ".")) for name in names)
    assert not list((tmp_path / "home/.cache/tnllm/outputs").iterdir()), "nothing stays here"


def test_an_interrupted_upload_never_looks_complete(storage, monkeypatch):
    def written():
        folder = begin_output("memory://out/x/")
        (folder / "b").mkdir(exist_ok=True)
        for name in ("a.json", "b/1", "b/2"):
            (folder / name).write_text(name)
        return folder

    put, sent = storage.put_file, []

    def failing(source, target, **more):
        if len(sent) == 2:
            raise OSError("the line is dead")
        sent.append(target)
        put(source, target, **more)

    monkeypatch.setattr(type(storage), "put_file", staticmethod(failing))
    with pytest.raises(RunError, match="memory://out/x/ cannot be written: the line is dead"):
        finish_output("memory://out/x/", written(), last="a.json")
    assert not storage.exists("/out/x/a.json") and storage.exists("/out/x/.uploading")
    monkeypatch.undo()
    storage.pipe_file("/out/x/b/3", b"of an upload of other content")
    finish_output("memory://out/x/", folder := written(), last="a.json")
    assert sorted(storage.find("/out/x")) == ["/out/x/a.json", "/out/x/b/1", "/out/x/b/2"]
    assert not folder.exists()


def test_two_processes_never_upload_to_one_url_at_once(storage):
    folder = begin_output("memory://out/y/")
    (folder / "a.json").write_text("{}")
    with only_writer(folder), pytest.raises(UserError, match="is being written by pid"):
        finish_output("memory://out/y/", folder, last="a.json")
    assert not storage.exists("/out/y/a.json") and (folder / "a.json").exists()
    finish_output("memory://out/y/", folder, last="a.json")
    with pytest.raises(UserError, match="another process has uploaded memory://out/y/ just now"):
        finish_output("memory://out/y/", folder, last="a.json")
    assert storage.find("/out/y") == ["/out/y/a.json"] and not folder.exists()


def test_outputs_that_cannot_be(tnllm, storage, tmp_path):
    for inputs in (["memory://a/b/c.jsonl"], ["memory://a/"], ["memory://a/b/"]):
        with pytest.raises(UserError, match=r"lies in its own input memory://a/.*, or around it"):
            begin_output("memory://a/b", inputs)
    with pytest.raises(RunError, match=r"http://127.0.0.1:9/x/ cannot be written"):
        begin_output("http://127.0.0.1:9/x/")
    code, _, stderr = tnllm("data", "dedup", "memory://web/", "-o", "memory://out/unique")
    assert code == 2 and "the output is the URL memory:/out/unique; give a folder" in stderr
    assert begin_output(f"file://{tmp_path}/x") == tmp_path / "x"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
