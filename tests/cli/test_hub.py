"""hf://ORG/NAME: against a small server that speaks as much of the hub's protocol as its client asks for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from tnllm import hub
from tnllm.errors import RunError, UserError

TOKEN = "hf_of_this_test"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: name → file → bytes. Its one revision is main, its commit is a digest of the files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    def commit(self, repo):
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()):
            digest.update(name.encode() + data)
        return digest.hexdigest()


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/")
        if path == "api/whoami-v2":
            good = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.send(200 if good else 401, {"name": "someone", "type": "user", "auth": {}})
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if path and repo not in self.server.repos:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if not path:
            return self.send(200, {})
        files, commit = self.server.repos[repo], self.server.commit(repo)
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        if revision not in ("main", commit):
            return self.send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        if api and parts[4:5] == ["tree"]:
            return self.send(
                200, [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
            )
        if api:
            siblings = [{"rfilename": name} for name in files]
            return self.send(200, {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        name = "/".join(parts[4:])
        if name not in files:
            return self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def do_POST(self):
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0].strip("/")
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            self.server.repos.setdefault(name, {})
            return self.send(200, {"url": f"https://huggingface.co/{name}", "name": name, "id": name})
        parts = path.split("/")
        if path == "api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            return self.send(
                200,
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]},
            )
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.server.repos[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        commit = self.server.commit(repo)
        return self.send(
            200,
            {"commitUrl": f"https://huggingface.co/{repo}/commit/{commit}", "commitOid": commit},
        )

    def send(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_a_model_goes_there_and_back(server, tnllm, small_weights, tmp_path, monkeypatch):
    """Converted, pushed, generated from, converted from; afterwards without a network."""
    code, _, err = tnllm(
        "convert", small_weights, tmp_path / "demo", "--to", "hf", "--push", "someone/demo", "--licence", "mit"
    )
    assert code == 0, err
    files = server.repos["someone/demo"]
    assert set(files) == {path.name for path in (tmp_path / "demo").iterdir() if path.is_file()}
    assert files["model.safetensors"] == (tmp_path / "demo/model.safetensors").read_bytes()
    assert b"license: mit\n" in files["README.md"]

    generate = ("generate", "--prompt", "My dear", "--max-tokens", "8", "--temperature", "0")
    here = tnllm(*generate, "--model", tmp_path / "demo")
    there = tnllm(*generate, "--model", "hf://someone/demo")
    assert there[:2] == (0, here[1])
    assert any(line.startswith("GET /someone/demo/resolve/") for line in server.asked)

    again = tnllm("convert", "hf://someone/demo@main", tmp_path / "back", "--to", "tnllm")
    assert again[0] == 0, again[2]
    assert (tmp_path / "back/config.json").is_file()

    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tnllm(*generate, "--model", "hf://someone/demo")[1] == here[1]
    assert server.asked == []


def test_without_a_network_the_cache_is_used(server, monkeypatch, capfd):
    server.repos["a/b"] = {"config.json": b"{}", "pytorch_model.bin": b"weights", "big.onnx": b"not for us"}
    first = hub.local("hf://a/b")
    # A release has pickles only; files of other programs are not downloaded.
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "pytorch_model.bin"]
    monkeypatch.setattr(hub, "answers", lambda url: False)
    server.asked.clear()
    assert hub.local("hf://a/b") == first and server.asked == []
    assert "does not answer: reading its cache on this machine only" in capfd.readouterr().err
    with pytest.raises(RunError, match=r"hf://a/c is not in the cache .*; where there is a network: hf download a/c"):
        hub.local("hf://a/c")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://alone", "'hf://alone' is no name of a model on the hub; give hf://ORG/NAME or hf://ORG/NAME@REVISION"),
        ("hf://a/b/c", "is no name of a model on the hub"),
        ("hf://a/b@", "is no name of a model on the hub"),
        ("hf://-a/..", "is no name of a model on the hub"),
        ("hf://a/absent", "hf://a/absent: no such model"),
        ("hf://a/b@v9", "hf://a/b@v9: no such branch, tag or commit"),
    ],
)
def test_names_that_are_not_there(server, name, message):
    server.repos["a/b"] = {"config.json": b"{}"}
    with pytest.raises(UserError) as caught:
        hub.local(name)
    assert message in str(caught.value)


def test_a_push_is_checked_before_the_work(server, tnllm, small_weights, tmp_path, monkeypatch):
    convert = ("convert", small_weights, tmp_path / "demo", "--to")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    wrong = tnllm(*convert, "hf", "--push", "someone/demo")
    assert wrong[0] == 2 and "log in with `hf auth login` or set HF_TOKEN" in wrong[2]
    bad = tnllm(*convert, "hf", "--push", "demo")
    assert bad[0] == 2 and "is no name of a model on the hub" in bad[2]
    other = tnllm(*convert, "tnllm", "--push", "someone/demo")
    assert other[0] == 2 and "--push is for --to hf" in other[2]
    dry = tnllm(*convert, "hf", "--push", "someone/demo", "--dry-run")
    assert dry[0] == 0 and "would upload" in dry[2] and server.repos == {}
    assert not (tmp_path / "demo").exists()
