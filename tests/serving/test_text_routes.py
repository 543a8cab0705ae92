"""Routes about text and the server; request ids, logs, origins; timings and log-probabilities of answers."""

import json
import re

import httpx
import pytest

from tests.serving.serving import running, wait_for
from tests.serving.test_app_fuzz import conforms
from tests.small_models import make_ready
from tnllm.chat_template import render
from tnllm.serving import schemas
from tnllm.serving.middleware import Settings

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}, {"role": "user", "content": "Ah."}]
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture(scope="module")
def client(ready):
    settings = Settings(name="small", more_keys=("one", "two"), cors_origins=(ORIGIN,), log_requests=True)
    with (
        running(ready, settings, num_slots=3, max_prompt_tokens=3000, max_new_tokens=50) as (address, _),
        httpx.Client(base_url=address, headers={"Authorization": "Bearer two"}, timeout=300) as client,
    ):
        yield client


def refused(answer, status, param, message):
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert message in error["message"] and "\n" not in error["message"]


def test_text_becomes_tokens_and_comes_back(client, ready):
    text = "The quick 今天"
    ids = ready.tokenizer.encode(text)
    answer = client.post("/tokenize", json={"content": text}).json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 3000}
    assert client.post("/tokenize", json={"prompt": text}).json()["tokens"] == ready.encode(text)
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True, "return_token_strs": True}).json()
    conforms(pieces, schemas.Tokenized)
    assert (
        b"".join(
            one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces["tokens"]
        )
        == text.encode()
    )
    assert pieces["token_strs"] == [ready.tokenizer.piece(id) for id in ids]
    back = client.post("/detokenize", json={"tokens": ids, "model": "small"}).json()
    assert back == {"content": text, "prompt": text}
    assert client.post("/detokenize", json={"tokens": []}).json()["content"] == ""
    assert client.post("/tokenize", json={"content": ""}).json()["tokens"] == []


def test_a_conversation_is_shown_as_it_is_read(client, ready):
    turns = [(turn["role"], turn["content"]) for turn in TALK]
    segments = render(ready.chat_template, turns, open_answer=True)
    prompt = client.post("/apply-template", json={"messages": TALK}).json()["prompt"]
    assert prompt == "".join(one.text + ("</s>" if one.eos else "") for one in segments)
    tokens = client.post("/tokenize", json={"messages": TALK}).json()["count"]
    usage = client.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 1}).json()["usage"]
    assert tokens == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("/tokenize", {}, 400, "content", "give one of content, prompt and messages; given: none"),
        ("/tokenize", {"content": "a", "prompt": "b"}, 400, "content", "given: content, prompt"),
        ("/tokenize", {"content": 5}, 400, "content", "content is 5; allowed: a text"),
        ("/tokenize", {"content": "a", "with_piece": True}, 400, "with_piece", "did you mean 'with_pieces'"),
        ("/tokenize", {"content": "a", "model": "large"}, 404, "model", "this server has 'small'"),
        ("/tokenize", {"messages": []}, 400, "messages", "messages is empty"),
        ("/detokenize", {}, 400, "tokens", "tokens is missing; give token ids"),
        ("/detokenize", {"tokens": 5}, 400, "tokens", "tokens is 5; allowed: a list of token ids"),
        ("/detokenize", {"tokens": [1, "a"]}, 400, "tokens", "tokens.1 is 'a'; token ids are whole numbers"),
        ("/detokenize", {"tokens": [1 << 70]}, 400, "tokens", "1180591620717411303424"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "-1"),
        ("/apply-template", {}, 400, "messages", "messages is missing"),
        ("/apply-template", {"messages": []}, 400, "messages", "messages is empty"),
        ("/apply-template", {"messages": [{"role": "x"}]}, 400, "messages.0.role", "messages.0.role is 'x'"),
    ],
)
def test_bad_input(client, path, body, status, param, message):
    refused(client.post(path, json=body), status, param, message)


def test_properties(client):
    props = client.get("/props").json()
    conforms(props, schemas.Props)
    assert props["total_slots"] == 3 and props["limits"]["prompt_tokens"] == 3000
    assert props["default_generation_settings"]["params"]["max_tokens"] == 50
    assert props["features"]["api_key"] is True and props["features"]["tools"] == ["none", "required", "named"]


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere", "/health", "/v1/models"])
def test_a_requests_id_comes_back_in_answers_and_errors(client, path):
    answer = client.post(path, json={"prompt": "a"}, headers={"X-Request-Id": "mine-1", "Authorization": "Bearer no"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json().get("error", {"request_id": "mine-1"})["request_id"] == "mine-1"
    for given in (b"", b"a b", b"a" * 129, b"\xff"):
        made = client.get("/v1/models", headers={b"X-Request-Id": given}).headers["x-request-id"]
        assert re.fullmatch("req-[0-9a-f]{32}", made)


def test_an_id_is_in_the_error_of_a_stream_too(client):
    body = {"prompt": "a", "stream": True, "max_tokens": 99}
    answer = client.post("/v1/completions", json=body, headers={"X-Request-Id": "s-1"})
    assert answer.json()["error"]["request_id"] == "s-1"


def test_requests_are_logged(client, capfd):
    client.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 3, "ignore_eos": True}, headers={"X-Request-Id": "log-1"}
    )
    client.get("/%1b[31m%0a?secret=1", headers={"X-Request-Id": "log-2"})
    lines = ""

    def all_there():
        nonlocal lines
        lines += capfd.readouterr().err
        return "log-1" in lines and "log-2" in lines

    wait_for(all_there)
    assert re.search(r"^log-1 127\.0\.0\.1 POST /v1/completions 200 in \d+\.\d{3} s, \d+ \+ 3 tokens$", lines, re.M)
    assert re.search(r"^log-2 127\.0\.0\.1 GET /%1B%5B31m%0A 404 in \d+\.\d{3} s$", lines, re.M)
    assert "secret" not in lines and "two" not in lines


def test_pages_of_an_allowed_origin_may_ask(client):
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = client.options("/v1/completions", headers={**asked, "Authorization": ""})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    answer = client.get("/v1/models", headers={"Origin": ORIGIN, "Authorization": "Bearer no"})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == ORIGIN
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    other = client.options("/v1/completions", headers={**asked, "Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/states", "GET, HEAD, POST"),
        ("/v1/states/x", "DELETE, GET, HEAD"),
        ("/slots", "GET, HEAD"),
        ("/tokenize", "POST"),
    ],
)
def test_refused_methods_name_all_that_are_allowed(client, path, methods):
    answer = client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_every_key_of_several_opens(client):
    for key, status in (("one", 200), ("two", 200), ("three", 401), ("one two", 401)):
        answer = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status


def test_an_answer_says_how_long_it_took(client):
    body = {"prompt": "The quick brown", "max_tokens": 4, "ignore_eos": True, "seed": 1}
    answer = client.post("/v1/completions", json=body).json()
    timings = answer["timings"]
    conforms(timings, schemas.Timings)
    assert timings["predicted_n"] == 4 and timings["prompt_n"] + timings["cache_n"] == answer["usage"]["prompt_tokens"]
    assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / 4, abs=0.001)
    assert min(timings["queue_ms"], timings["prompt_ms"], timings["predicted_ms"]) >= 0
    with client.stream("POST", "/v1/completions", json={**body, "n": 2, "stream": True}) as streamed:
        events = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
    assert [("timings" in event) for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["timings"]["predicted_n"] == 8


def test_tokens_spelled_as_ids(client, ready):
    body = {
        "prompt": "The quick",
        "max_tokens": 3,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
    }
    tokens = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
    assert all(re.fullmatch(r"token_id:\d+", token) for token in tokens)


def test_log_probabilities_of_a_prompt(client, ready):
    ids = ready.tokenizer.encode("The quick brown fox")
    body = {"prompt": ids, "max_tokens": 0, "logprobs": 3, "echo": True}
    echoed = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    answer = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1, "prompt_logprobs": 3}).json()
    conforms(answer, schemas.Completion)
    [choice] = answer["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(ids) - 1 and choice["logprobs"] is None
    for id, entry, logprob in zip(ids[1:], rest, echoed["token_logprobs"][1:], strict=True):
        assert entry[str(id)]["logprob"] == logprob and 3 <= len(entry) <= 4
        ranks = {one["rank"] for one in entry.values()} - {None}
        assert ranks == {1, 2, 3}
    chat = client.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 1, "prompt_logprobs": 0}).json()
    conforms(chat, schemas.ChatCompletion)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    both = {"prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": True, "prompt_logprobs": 3}
    [choice] = client.post("/v1/completions", json=both).json()["choices"]
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    refused(client.post("/v1/completions", json={"prompt": "a", "prompt_logprobs": 1, "stream": True}), 400,
            "prompt_logprobs", "it needs stream to be false")  # fmt: skip
    refused(
        client.post("/v1/completions", json={"prompt": "a", "prompt_logprobs": 21}), 400, "prompt_logprobs", "0 to 20"
    )
    many = {"prompt": [5] * 3000, "prompt_logprobs": 20, "n": 50}
    refused(client.post("/v1/completions", json=many), 400, "logprobs", "log-probabilities")
