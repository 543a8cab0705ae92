"""States on the server: what was read once is continued as if it had just been read, by the key that made it alone."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.serving.serving import running
from tests.small_models import KINDS, make_ready, small_model
from tnllm.generation.context import load_context, read, weights_hash
from tnllm.generation.conversation import part_ids
from tnllm.generation.decoder import generate
from tnllm.generation.samples import Result
from tnllm.serving import app as app_module
from tnllm.serving import states as states_module
from tnllm.serving.bodies import RequestError
from tnllm.serving.middleware import Settings
from tnllm.serving.states import ENTRY_BYTES, StateStore

BINARY = {"Content-Type": "application/octet-stream"}
BOOK = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@contextmanager
def serving(ready, monkeypatch, keys=("one", "two"), **options):
    """Yield (engine, a client for each key); `options` are the store's."""
    stores = []

    def store(*args, **more):
        stores.append(StateStore(*args, **more, **options))
        return stores[-1]

    monkeypatch.setattr(app_module, "StateStore", store)
    with running(ready, Settings(name="small", more_keys=keys), num_slots=4) as (address, engine):
        clients = [
            httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=300)
            for key in keys or [""]
        ]
        yield engine, clients, stores[0]
        for client in clients:
            client.close()


def made(client, **body):
    answer = client.post("/v1/states", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status, code, text=""):
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and text in error["message"], answer.text


def texts(answer):
    assert answer.status_code == 200, answer.text
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in answer.json()["choices"]]


def alone(ready, ids, context, **options):
    params = ready.params(**options)
    events = generate(ready.model, ready.tokenizer, [ids], params, contexts=[context], eos_ids=ready.eos_ids)
    results = sorted((event for event in events if isinstance(event, Result)), key=lambda result: result.sample)
    return [result.text for result in results]


@pytest.mark.parametrize("kind", KINDS, ids=["linear", "softmax", "hybrid"])
def test_a_state_is_continued_as_its_text(kind, tokenizer, monkeypatch):
    ready = make_ready(small_model(**kind), tokenizer)
    asked = {"max_tokens": 9, "seed": 3, "n": 2, "temperature": 0.8, "repetition_penalty": 1.2}
    with serving(ready, monkeypatch) as (engine, [client, _], _):
        state = made(client, prompt=BOOK)
        [book] = read(ready.model, [ready.encode(BOOK)])
        assert state["tokens"] == book.num_tokens == state["usage"]["prompt_tokens"]
        before = engine.metrics.prompt_tokens
        forks = [client.post(f"/v1/states/{state['id']}/fork", json={}).json()["id"] for _ in range(20)]
        for id in (state["id"], forks[7]):
            answer = client.post("/v1/completions", json={"state": id, **asked})
            assert texts(answer) == alone(ready, [], book, **asked)
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == book.num_tokens
        assert engine.metrics.prompt_tokens == before, "forks and their texts read nothing"
        ids = ready.encode("今天 fox", start=False)
        answer = client.post("/v1/completions", json={"state": forks[0], "prompt": "今天 fox", **asked})
        assert texts(answer) == alone(ready, ids, book, **asked)
        assert engine.metrics.prompt_tokens == before + len(ids)
        longer = client.post(f"/v1/states/{state['id']}/fork", json={"prompt": "今天 fox"}).json()
        assert longer["tokens"] == book.num_tokens + len(ids)
        assert texts(client.post("/v1/completions", json={"state": longer["id"], **asked})) == texts(answer)


@pytest.mark.parametrize(
    "parts",
    [
        [[("user", "The")], []],
        [[("user", "The"), ("assistant", "fox")], [("user", "And?")]],
        [[("user", "The")], [("assistant", "fox"), ("user", "And?")], []],
        [[("user", "The"), ("assistant", "fox"), ("user", "And?")], [("assistant", "the do")]],
    ],
)
def test_a_conversation_in_parts_is_the_conversation(ready, monkeypatch, parts):
    def messages(part):
        return [{"role": role, "content": text} for role, text in part]

    with serving(ready, monkeypatch) as (_, [client, _], _):
        state = made(client, messages=messages(parts[0]))
        for part in parts[1:-1]:
            state = client.post(f"/v1/states/{state['id']}/fork", json={"messages": messages(part)}).json()
        asked = {"max_tokens": 8, "seed": 1}
        answer = client.post(
            "/v1/chat/completions", json={"state": state["id"], "messages": messages(parts[-1]), **asked}
        )
        whole = [message for part in parts for message in part]
        full = client.post("/v1/chat/completions", json={"messages": messages(whole), **asked})
        assert texts(answer) == texts(full)
        ids = ready.at_start(part_ids(ready, whole, awaits_answer=False, is_last=True)[0])
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_a_state_that_awaits_an_answer_takes_no_question(ready, monkeypatch):
    with serving(ready, monkeypatch) as (_, [client, _], _):
        state = made(client, messages=[{"role": "user", "content": "The"}])
        question = {"state": state["id"], "messages": [{"role": "user", "content": "And?"}]}
        refused(client.post("/v1/chat/completions", json=question), 400, None, "waits for an answer")
        book = made(client, prompt=BOOK)
        refused(client.post("/v1/chat/completions", json={"state": book["id"]}), 400, None, "messages is empty")


def test_a_state_belongs_to_its_key(ready, monkeypatch):
    with serving(ready, monkeypatch) as (_, [one, two], _):
        state = made(one, prompt=BOOK)
        id = state["id"]
        file = one.get(f"/v1/states/{id}/content").content
        for answer in (
            two.get(f"/v1/states/{id}"),
            two.get(f"/v1/states/{id}/content"),
            two.put(f"/v1/states/{id}/content", content=file, headers=BINARY),
            two.delete(f"/v1/states/{id}"),
            two.post(f"/v1/states/{id}/fork", json={}),
            two.post("/v1/completions", json={"state": id}),
            two.post("/v1/chat/completions", json={"state": id, "messages": [{"role": "user", "content": "a"}]}),
        ):
            refused(answer, 404, "state_not_found")
            # As of one that nobody has.
            none = "state-" + 32 * "0"
            assert (
                answer.json()["error"]["message"].replace(id, none)
                == (two.get(f"/v1/states/{none}").json()["error"]["message"])
            )
        assert two.get("/v1/states").json()["data"] == []
        assert [entry["id"] for entry in one.get("/v1/states").json()["data"]] == [id]
        assert one.get(f"/v1/states/{id}").json()["tokens"] == state["tokens"]


def test_ids_are_random_and_lists_have_pages(ready, monkeypatch):
    with serving(ready, monkeypatch) as (_, [one, _], _):
        first = made(one, prompt=BOOK)["id"]
        ids = [first, *(one.post(f"/v1/states/{first}/fork", json={}).json()["id"] for _ in range(4))]
        assert len({id for id in ids if len(bytes.fromhex(id.removeprefix("state-"))) == 16}) == 5
        page = one.get("/v1/states?limit=2").json()
        assert page["has_more"] and [state["id"] for state in page["data"]] == ids[:2]
        page = one.get(f"/v1/states?after={ids[1]}").json()
        assert not page["has_more"] and [state["id"] for state in page["data"]] == ids[2:]
        for query in ("limit=0", "limit=1001", "limit=x", "after=state-0"):
            refused(one.get(f"/v1/states?{query}"), 400, None, "allowed")


def test_quotas(ready, monkeypatch):
    [book] = read(ready.model, [ready.encode(BOOK)])
    size = book.nbytes + ENTRY_BYTES
    with serving(ready, monkeypatch, max_bytes=5 * size, max_bytes_of_owner=3 * size) as (_, [one, two], _):
        ids = [made(one, prompt=BOOK)["id"] for _ in range(2)]
        forks = [one.post(f"/v1/states/{ids[0]}/fork", json={}).json()["id"] for _ in range(3)]
        refused(one.post("/v1/states", json={"prompt": BOOK}), 413, "state_quota_exceeded", "your states take")
        made(two, prompt=BOOK)
        for id in forks:
            assert one.delete(f"/v1/states/{id}").json()["deleted"]
        made(one, prompt=BOOK)
        file = one.get(f"/v1/states/{ids[0]}/content").content
        upload = one.post("/v1/states", content=file, headers=BINARY)
        refused(upload, 413, "state_quota_exceeded")
        made(two, prompt="The fox")
        refused(two.post("/v1/states", json={"prompt": BOOK}), 413, "state_quota_exceeded", "states of this server")
        lines = one.get("/metrics").text.splitlines()
        assert "tnllm_states 5" in lines and "tnllm_states_refused_total 3" in lines


def test_states_expire_unless_they_are_used(ready, monkeypatch):
    now = [1000.0]
    with serving(ready, monkeypatch, seconds=100) as (engine, [one, _], store):
        real = time.time
        monkeypatch.setattr(states_module.time, "time", lambda: now[0])
        used, left = made(one, prompt=BOOK)["id"], made(one, prompt=BOOK, expires_in=50)
        assert left["expires_at"] == 1050
        now[0] += 49
        assert one.get(f"/v1/states/{used}").json()["expires_at"] == 1149
        now[0] += 2
        refused(one.get(f"/v1/states/{left['id']}"), 404, "state_not_found")
        now[0] += 97
        assert one.get(f"/v1/states/{used}").status_code == 200
        now[0] += 101
        refused(one.post("/v1/completions", json={"state": used}), 404, "state_not_found")
        assert engine.metrics.states_expired == 2 and store.states("") == []
        monkeypatch.setattr(states_module.time, "time", real)


def test_a_state_may_be_deleted_while_it_is_continued(ready, monkeypatch):
    with serving(ready, monkeypatch) as (_, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        asked = {"state": id, "max_tokens": 400, "ignore_eos": True, "seed": 5}
        [book] = read(ready.model, [ready.encode(BOOK)])
        with one.stream("POST", "/v1/completions", json={**asked, "stream": True}) as stream:
            lines = stream.iter_lines()
            text = json.loads(next(lines)[6:])["choices"][0]["text"]
            assert one.delete(f"/v1/states/{id}").status_code == 200
            refused(one.get(f"/v1/states/{id}"), 404, "state_not_found")
            for line in lines:
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        assert [text] == alone(ready, [], book, max_tokens=400, ignore_eos=True, seed=5)


def test_a_file_that_forks_share_outlives_an_upload_to_a_deleted_state(ready, monkeypatch, tmp_path):
    with serving(ready, monkeypatch, folder=tmp_path) as (_, (one, _), store):
        path = f"/v1/states/{made(one, prompt=BOOK)['id']}"
        fork = one.post(f"{path}/fork", json={}).json()["id"]
        data = one.get(f"{path}/content").content
        stored, parse = store._states[path.rpartition("/")[2]], store.parse

        def parse_while_another_deletes(*args):
            store.delete(stored.owner, stored.id)
            return parse(*args)

        monkeypatch.setattr(store, "parse", parse_while_another_deletes)
        refused(one.put(f"{path}/content", content=data, headers=BINARY), 404, "state_not_found")
        with pytest.raises(RequestError, match="no state"):
            store.fork(stored)
        assert sorted(file.suffix for file in tmp_path.iterdir() if file.name[0] in "cs") == [".json", ".safetensors"]
    with serving(ready, monkeypatch, folder=tmp_path) as (_, (one, _), _):
        assert len(texts(one.post("/v1/completions", json={"state": fork, "max_tokens": 3}))) == 1


def test_states_are_kept_across_restarts(ready, monkeypatch, tmp_path):
    asked = {"max_tokens": 9, "seed": 2}
    with serving(ready, monkeypatch, folder=tmp_path) as (_, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        fork = one.post(f"/v1/states/{id}/fork", json={}).json()["id"]
        expected = texts(one.post("/v1/completions", json={"state": id, **asked}))
        other = made(one, prompt="The fox")["id"]
    assert len(list(tmp_path.glob("state-*.json"))) == 3 and len(list(tmp_path.glob("content-*"))) == 2
    assert b"one" not in b"".join(path.read_bytes()[:40] for path in tmp_path.glob("*.json")), "no key on the disk"
    # What a writer that was killed leaves, and a file that is not ours.
    (tmp_path / f"content-{32 * 'a'}.safetensors").write_bytes(b"")
    (tmp_path / f"state-{32 * 'b'}.json.tmp-7").write_bytes(b"")
    (tmp_path / f"state-{32 * 'c'}.json").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    with serving(ready, monkeypatch, folder=tmp_path) as (engine, [one, two], _):
        refused(two.get(f"/v1/states/{id}"), 404, "state_not_found")
        one.delete(f"/v1/states/{id}")
        assert texts(one.post("/v1/completions", json={"state": fork, **asked})) == expected
        assert engine.metrics.prompt_tokens == 0
        content = json.loads((tmp_path / f"{other}.json").read_text())["content"] + ".safetensors"
        damaged = bytearray((tmp_path / content).read_bytes())
        damaged[-9] ^= 1
        (tmp_path / content).write_bytes(damaged)
        refused(one.post("/v1/completions", json={"state": other}), 410, "state_damaged", "digest")
        one.delete(f"/v1/states/{fork}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", f"state-{32 * 'c'}.json"]


def test_another_models_states_are_not_served_and_stay(ready, monkeypatch, tmp_path, tokenizer):
    with serving(ready, monkeypatch, folder=tmp_path) as (_, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        file = one.get(f"/v1/states/{id}/content").content
    other = make_ready(small_model(gate="none"), tokenizer)
    with serving(other, monkeypatch, folder=tmp_path) as (_, [one, _], _):
        refused(one.get(f"/v1/states/{id}"), 404, "state_not_found")
        refused(one.post("/v1/states", content=file, headers=BINARY), 400, "state_refused", "other weights")
    with serving(ready, monkeypatch, folder=tmp_path) as (_, [one, _], _):
        assert one.get(f"/v1/states/{id}").status_code == 200


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("which", ["content", "state"])
def test_a_full_disk_refuses_and_keeps_nothing(ready, monkeypatch, tmp_path, code, which):
    write = states_module.write_bytes_atomic

    def full(path, data):
        if path.name.startswith(which):
            raise OSError(code, os.strerror(code), str(path))
        write(path, data)

    with serving(ready, monkeypatch, folder=tmp_path) as (_, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        before = sorted(tmp_path.iterdir())
        file = one.get(f"/v1/states/{id}/content").content
        monkeypatch.setattr(states_module, "write_bytes_atomic", full)
        answers = [
            one.post("/v1/states", json={"prompt": BOOK}),
            one.post("/v1/states", content=file, headers=BINARY),
            one.put(f"/v1/states/{id}/content", content=file, headers=BINARY),
        ]
        for answer in answers:
            refused(answer, 507, "state_not_written", os.strerror(code))
            assert str(tmp_path) not in answer.text
        assert [state["id"] for state in one.get("/v1/states").json()["data"]] == [id]
        assert sorted(tmp_path.iterdir()) == before
        monkeypatch.setattr(states_module, "write_bytes_atomic", write)
        assert one.post(f"/v1/states/{id}/fork", json={}).status_code == 200


def test_files_move_between_servers_and_generate(ready, monkeypatch, tmp_path):
    asked = {"max_tokens": 9, "seed": 2}
    with serving(ready, monkeypatch) as (_engine, [one, two], _):
        id = made(one, prompt=BOOK)["id"]
        expected = texts(one.post("/v1/completions", json={"state": id, **asked}))
        file = one.get(f"/v1/states/{id}/content")
        (tmp_path / "book.state").write_bytes(file.content)
        context = load_context(tmp_path / "book.state", ready.model, weights_hash(ready.model))
        assert alone(ready, [], context, **asked) == expected
        uploaded = two.post("/v1/states", content=file.content, headers=BINARY).json()
        assert uploaded["id"] != id and texts(two.post("/v1/completions", json={"state": uploaded["id"], **asked})) == (
            expected
        )
        other = made(two, prompt="The fox")["id"]
        assert two.put(f"/v1/states/{other}/content", content=file.content, headers=BINARY).json()["id"] == other
        assert texts(two.post("/v1/completions", json={"state": other, **asked})) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors["logits"].add_(1),
        lambda tensors, metadata: metadata.update(tail="[5]"),
        lambda tensors, metadata: metadata.update(num_tokens="7"),
        lambda tensors, metadata: metadata.update(tokenizer="0" * 64),
        lambda tensors, metadata: metadata.update(dtype="bfloat16"),
        lambda tensors, metadata: metadata.update(format="tnllm-context-9"),
        lambda tensors, metadata: metadata.pop("metadata_sha256"),
        lambda tensors, metadata: metadata.pop("sha256"),
    ],
)
def test_tampered_uploads_are_refused(ready, monkeypatch, tmp_path, change):
    with serving(ready, monkeypatch) as (_, [one, _], _):
        path = tmp_path / "a.state"
        path.write_bytes(one.get(f"/v1/states/{made(one, prompt=BOOK)['id']}/content").content)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        change(tensors, metadata)
        save_file(tensors, path, metadata)
        refused(one.post("/v1/states", content=path.read_bytes(), headers=BINARY), 400, "state_refused")


def test_bad_input(ready, monkeypatch):
    with serving(ready, monkeypatch) as (_, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        for body, text in (
            ({}, "one prompt"),
            ({"prompt": ""}, "one prompt"),
            ({"prompt": ["a", "b"]}, "one prompt"),
            ({"prompt": "a", "messages": []}, "both"),
            ({"messages": []}, "messages is empty"),
            ({"prompt": [1, 999_999]}, "outside the vocabulary"),
            ({"prompt": "a", "expires_in": 0}, "expires_in is 0"),
            ({"prompt": "a", "expire_in": 5}, "did you mean 'expires_in'"),
        ):
            answer = one.post("/v1/states", json=body)
            refused(answer, 400, None, text)
        refused(one.post("/v1/states", json={"prompt": "a", "model": "x"}), 404, "model_not_found")
        for state in ("x", "state-1", "../../etc/passwd", ""):
            refused(one.post("/v1/completions", json={"state": state}), 404, "state_not_found")
        assert one.post("/v1/completions", json={"state": 5}).status_code == 400
        assert one.put(f"/v1/states/{id}/content", content=b"{}").status_code == 415
        for content in (b"", b"\xff" * 20, b"\0" * 8, json.dumps({"a": 1}).encode()):
            refused(one.post("/v1/states", content=content, headers=BINARY), 400, "state_refused")
        big = one.post("/v1/states", content=b"0" * 2_000_000, headers=BINARY)
        refused(big, 413, "body_too_large")


@pytest.mark.parametrize("keys", [(), ("one",)])
def test_nothing_is_written_without_a_folder(ready, monkeypatch, tmp_path, keys):
    monkeypatch.setattr(states_module, "write_bytes_atomic", None)
    with serving(ready, monkeypatch, keys=keys) as (_, [one, *_], _):
        id = made(one, prompt=BOOK)["id"]
        one.post(f"/v1/states/{id}/fork", json={})
        assert len(one.get("/v1/states").json()["data"]) == 2


def test_an_open_server_without_keys_lists_no_states(ready):
    settings = Settings(name="small", hosts=None, states_are_hidden=True)
    with running(ready, settings, num_slots=1) as (address, _), httpx.Client(base_url=address, timeout=300) as client:
        id = made(client, prompt=BOOK)["id"]
        refused(client.get("/v1/states"), 403, "states_not_listed")
        assert client.get(f"/v1/states/{id}").status_code == 200


def test_many_states_and_forks_under_load_keep_their_texts(ready, monkeypatch):
    """The small form of `python -m tests.serving.state_load`."""
    from tests.serving.state_load import made_books, num_different, texts_alone, texts_under_load

    books = made_books(6)
    with serving(ready, monkeypatch) as (_, [one, _], _):
        texts = texts_under_load(one, books, num_forks=8, num_tokens=6, workers=8)
    alone = [texts_alone(ready, 8, 6, book) for book in books]
    assert list(map(len, texts)) == [8] * 6 and num_different(texts, alone) == 0
    alone[2][3] += "!"
    assert num_different(texts, alone) == 1


def test_forks_of_one_state_at_once(ready, monkeypatch, tmp_path):
    with serving(ready, monkeypatch, folder=tmp_path) as (engine, [one, _], _):
        id = made(one, prompt=BOOK)["id"]
        with ThreadPoolExecutor(8) as pool:
            forks = list(pool.map(lambda _: one.post(f"/v1/states/{id}/fork", json={}).json()["id"], range(60)))
            assert len(set(forks)) == 60 and len(list(tmp_path.glob("content-*"))) == 1
            list(pool.map(lambda id: one.delete(f"/v1/states/{id}"), [id, *forks]))
        assert list(tmp_path.iterdir()) == [] and engine.metrics.text().count("\ntnllm_states 0\n") == 1
