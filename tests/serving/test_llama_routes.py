"""llama.cpp's routes: its names of keys, its answers, and slots that are saved, restored and erased as states."""

import json

import httpx
import pytest

from tests.serving.serving import running
from tests.serving.test_app_fuzz import conforms
from tests.small_models import make_ready
from tnllm.serving import schemas
from tnllm.serving.middleware import Settings
from tnllm.serving.states import StateStore

BOOK = "The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture
def clients(ready):
    settings = Settings(name="small", more_keys=("one", "two"))
    with running(ready, settings, num_slots=3, max_new_tokens=50) as (address, _):
        both = [
            httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=300)
            for key in ("one", "two")
        ]
        yield both
        for client in both:
            client.close()


def refused(answer, status, param, message):
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert message in error["message"]


def test_a_completion_has_the_text_of_the_other_route(clients):
    client = clients[0]
    theirs = {"prompt": "The quick", "n_predict": 12, "seed": 3, "repeat_penalty": 1.1, "n_probs": 2, "top_k": 20}
    ours = {"prompt": "The quick", "max_tokens": 12, "seed": 3, "repetition_penalty": 1.1, "logprobs": 2, "top_k": 20}
    text = client.post("/v1/completions", json=ours).json()["choices"][0]
    for path in ("/completion", "/completions"):
        answer = client.post(path, json={**theirs, "return_tokens": True}).json()
        conforms(answer, schemas.NativeCompletion)
        assert answer["content"] == text["text"] and answer["stop"] is True
        assert answer["stop_type"] == {"stop": "eos", "length": "limit"}[text["finish_reason"]]
        assert len(answer["tokens"]) == answer["tokens_predicted"] and answer["generation_settings"]["seed"] == 3
        logprobs = [entry["logprob"] for entry in answer["completion_probabilities"]]
        assert logprobs == text["logprobs"]["token_logprobs"]
    with client.stream("POST", "/completion", json={**theirs, "stream": True}) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["content"] for event in events) == text["text"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    # Of every token, also one that completes no character.
    assert [len(event["tokens"]) for event in events] == [1] * (len(events) - 1) + [0]
    assert events[-1]["timings"]["predicted_n"] == events[-1]["tokens_predicted"]


def test_several_prompts_and_stop_words(clients):
    client = clients[0]
    both = client.post("/completion", json={"prompt": ["The", "A"], "n_predict": 3, "seed": 1}).json()
    assert [answer["prompt"] for answer in both] == ["The", "A"]
    free = client.post("/completion", json={"prompt": "The", "n_predict": 30, "seed": 1, "ignore_eos": True}).json()
    word = free["content"][3:5]
    body = {"prompt": "The", "n_predict": 30, "seed": 1, "ignore_eos": True, "stop": ["\0\0", word]}
    cut = client.post("/completion", json=body).json()
    assert (cut["stop_type"], cut["stopping_word"]) == ("word", word)
    assert free["content"].startswith(cut["content"] + word)
    banned = client.post("/completion", json={"prompt": "The", "n_predict": 1, "logit_bias": [[5, False], [6, 1.5]]})
    assert banned.status_code == 200, banned.text
    chat = client.post("/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    conforms(chat.json(), schemas.ChatCompletion)


def test_a_slot_is_continued_saved_restored_and_erased(clients):
    client = clients[0]

    def ask(prompt, slot=1, **more):
        body = {"prompt": prompt, "n_predict": 8, "seed": 1, "id_slot": slot, **more}
        answer = client.post("/completion", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    alone = client.post("/completion", json={"prompt": BOOK + "Then", "n_predict": 8, "seed": 1}).json()
    first = ask(BOOK)
    continued = ask(BOOK + "Then")
    assert continued["content"] == alone["content"]
    assert 0 < continued["timings"]["cache_n"] <= first["tokens_evaluated"]
    # Another text is read from its start.
    assert ask("Another text.")["timings"]["cache_n"] == 0
    assert ask(BOOK)["timings"]["predicted_n"] > 0
    saved = client.post("/slots/1?action=save", json={"filename": "book.bin"}).json()
    conforms(saved, schemas.SlotAction)
    assert saved["n_saved"] == first["tokens_evaluated"] and saved["n_written"] > 0
    assert [slot["n_past"] for slot in client.get("/slots").json()] == [0, saved["n_saved"], 0]
    assert client.post("/slots/1?action=erase", json={}).json() == {"id_slot": 1, "n_erased": saved["n_saved"]}
    restored = client.post("/slots/0?action=restore", json={"filename": "book.bin"}).json()
    conforms(restored, schemas.SlotAction)
    assert restored["n_restored"] == saved["n_saved"]
    again = ask(BOOK + "Then", slot=0)
    assert again["content"] == alone["content"] and again["timings"]["cache_n"] >= saved["n_saved"] - 1
    # Saved again under the name, there is one state; it is a state like any other.
    client.post("/slots/0?action=save", json={"filename": "book.bin"})
    [state] = client.get("/v1/states").json()["data"]
    assert state["tokens"] > saved["n_saved"]
    # Another key has neither the slot's state nor the file.
    other = clients[1]
    assert [slot["n_past"] for slot in other.get("/slots").json()] == [0, 0, 0]
    refused(other.post("/slots/0?action=restore", json={"filename": "book.bin"}), 404, "filename", "nothing was saved")
    refused(other.post("/slots/0?action=save", json={"filename": "x"}), 400, "id_slot", "slot 0 has read nothing")
    client.delete(f"/v1/states/{state['id']}")
    refused(client.post("/slots/0?action=restore", json={"filename": "book.bin"}), 404, "filename", "nothing was saved")


def test_a_saved_slot_outlives_a_restart(ready, tmp_path):
    from tnllm.generation.context import read, weights_hash
    from tnllm.serving.llama_routes import SlotStates, _Held
    from tnllm.serving.metrics import Metrics

    weights, [context] = weights_hash(ready.model), read(ready.model, [[5, 6, 7]])
    store = StateStore(ready, weights, Metrics(), folder=tmp_path)
    slots = SlotStates(2, store)
    slots.put("me", 0, _Held(context, weights, "digest"))
    slots.save("me", 0, "a/../b")
    slots = SlotStates(2, StateStore(ready, weights, Metrics(), folder=tmp_path))
    assert slots.restore("me", 1, "a/../b")["n_restored"] == 3
    held = slots.get("me", 1)
    assert held.digest == "digest" and held.context.num_tokens == 3
    # The least recently put goes first.
    for slot in (2, 3):
        slots.put("me", slot, held)
    assert slots.get("me", 1) is None and slots.get("me", 3) is held


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/completion", {"prompt": "a", "n_predict": "x"}, "n_predict", "n_predict is 'x'; allowed: a whole number"),
        ("/completion", {"prompt": "a", "n_predict": 1, "max_tokens": 1}, "n_predict", "are the same"),
        ("/completion", {"prompt": "a", "n_probs": 21}, "n_probs", "n_probs is 21; allowed: a whole number, 0 to 20"),
        ("/completion", {"prompt": "a", "id_slot": 3}, "id_slot", "id_slot is 3; allowed: -1 to 2"),
        (
            "/completion",
            {"prompt": "a", "logit_bias": [[5]]},
            "logit_bias",
            "allowed: pairs of a token id and a number",
        ),
        ("/completion", {"prompt": "a", "json_schema": {"type": "x"}, "grammar": "x"}, "json_schema", "are the same"),
        ("/completion", {"prompt": {"text": "a"}}, "prompt", "allowed: a text, a list of texts"),
        ("/completion", {"prompt": "a", "mirostat": 2}, "mirostat", "mirostat is 2, which is not supported"),
        ("/slots/9?action=save", {"filename": "a"}, "id_slot", "the slot is '9'; allowed: 0 to 2"),
        ("/slots/x?action=save", {"filename": "a"}, "id_slot", "the slot is 'x'"),
        ("/slots/0?action=burn", {"filename": "a"}, "action", "action is 'burn'; allowed: save, restore, erase"),
        ("/slots/0", {"filename": "a"}, "action", "action is ''"),
        ("/slots/0?action=save", {}, "filename", "filename is the name of what is saved or restored"),
        ("/slots/0?action=erase", {"filename": "a"}, "filename", "erase has none"),
        ("/slots/0?action=save", {"filename": 5}, "filename", "filename is 5; allowed: a text"),
    ],
)
def test_bad_input(clients, path, body, param, message):
    refused(clients[0].post(path, json=body), 400, param, message)


def test_a_schema_in_their_form(clients):
    pytest.importorskip("llguidance", reason="needs the extra schema")
    schema = {"enum": ["ab", "cd"]}
    for more in ({"json_schema": schema}, {"grammar": 'root ::= "\\"ab\\"" | "\\"cd\\""'}):
        answer = clients[0].post("/completion", json={"prompt": "a", "seed": 1, "n_predict": 50, **more}).json()
        assert json.loads(answer["content"]) in ("ab", "cd") and answer["stop_type"] == "eos"
