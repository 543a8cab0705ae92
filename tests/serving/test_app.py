"""The server, over real connections: what the official client sees, what hostile ones get, what vanished ones free."""

import json
import re
import socket
import threading

import httpx
import openai
import pytest

from tests.serving.serving import running, wait_for
from tests.small_models import make_ready
from tnllm import assets
from tnllm.generation.conversation import Conversation, part_ids
from tnllm.generation.decoder import generate
from tnllm.generation.samples import Result
from tnllm.serving.middleware import Settings

KEY = "sesame"
LIMITS = {"num_slots": 4, "queue_size": 8, "max_prompt_tokens": 3000, "max_new_tokens": 50_000}


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture(scope="module")
def server(ready):
    with running(ready, Settings(name="small", api_key=KEY, max_body_bytes=50_000), **LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server[0], headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
        yield client


def alone(ready, ids, **options):
    events = generate(ready.model, ready.tokenizer, [ids], ready.params(**options), eos_ids=ready.eos_ids)
    return sorted((event for event in events if isinstance(event, Result)), key=lambda result: result.sample)


FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "tnllm"
    with pytest.raises(openai.NotFoundError, match="model is 'large'; this server has 'small'"):
        client.models.retrieve("large")


def test_completions_equal_generate(client, ready):
    prompts = ["The quick", "今天天气"]
    options = {"max_tokens": 25, "temperature": 0.9, "seed": 3, "n": 2}
    done = client.completions.create(
        model="small", prompt=prompts, stop=["e d", "们"], **options, extra_body={"top_k": 30, "min_p": 0.01}
    )
    expected = [
        result
        for prompt in prompts
        for result in alone(ready, ready.encode(prompt), stop=("e d", "们"), top_k=30, min_p=0.01, **options)
    ]
    assert [choice.text for choice in done.choices] == [result.text for result in expected]
    assert [choice.finish_reason for choice in done.choices] == [FINISH[result.finish_reason] for result in expected]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage.prompt_tokens == sum(len(ready.encode(prompt)) for prompt in prompts)
    assert done.usage.completion_tokens == sum(len(result.tokens) for result in expected)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


@pytest.mark.slow
def test_a_stream_adds_up_to_the_whole(client, ready):
    """Chinese text of byte tokens, so that characters are split between tokens."""
    asked = {"model": "small", "prompt": "今天", "max_tokens": 60, "seed": 11, "n": 2, "temperature": 1.5}
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "something came after the end"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    whole = client.completions.create(**asked)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens > 0
    expected = alone(ready, ready.encode("今天"), max_tokens=60, seed=11, n=2, temperature=1.5)
    assert texts == [result.text for result in expected]


def test_chat_equals_the_chat_command(client, ready):
    asked = {"model": "small", "max_tokens": 12, "seed": 4}
    talk = Conversation(ready, ready.params(max_tokens=12, seed=4), ready.chat_template)
    messages = []
    for message in ("The fox?", "今天？"):
        *_, result = talk.ask(message)
        messages.append({"role": "user", "content": message})
        answer = client.chat.completions.create(messages=messages, **asked)
        assert answer.choices[0].message.content == result.text
        streamed = ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **asked):
            streamed += chunk.choices[0].delta.content or ""
        assert streamed == result.text
        messages.append({"role": "assistant", "content": result.text})
        # Only an answer that ended by itself is known to be read back as the same tokens.
        if ready.tokenizer.encode(result.text) != [id for id in result.tokens if id != ready.tokenizer.eos_id]:
            break


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "The"), ("user", "fox")],
        [("user", "The"), ("assistant", "fox"), ("system", "Be quick."), ("user", "And?")],
        [("system", "Be quick.")],
        [("developer", "Be quick.")],
        [("user", "The"), ("assistant", "quick br")],
        [("assistant", "quick"), ("user", "brown")],
    ],
)
def test_turns_come_in_any_order_and_an_answer_may_be_begun(client, ready, messages):
    asked = {"max_tokens": 6, "seed": 2}
    answer = client.chat.completions.create(
        model="small", messages=[{"role": role, "content": text} for role, text in messages], **asked
    )
    ids = ready.at_start(part_ids(ready, messages, awaits_answer=False, is_last=True)[0])
    [expected] = alone(ready, ids, stop=("\nHuman:",), **asked)
    assert answer.choices[0].message.content == expected.text and answer.usage.prompt_tokens == len(ids)
    if messages[-1][0] == "assistant":
        assert ids[-len(ready.encode(messages[-1][1])) :] == ready.encode(messages[-1][1])


def test_chat_takes_a_system_text_and_parts(client):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "fox"}]
    asked = {"model": "small", "max_completion_tokens": 5, "seed": 1}
    one = client.chat.completions.create(
        messages=[{"role": "system", "content": "Be quick."}, {"role": "user", "content": parts}], **asked
    )
    two = client.chat.completions.create(
        messages=[{"role": "developer", "content": "Be quick."}, {"role": "user", "content": "The fox"}], **asked
    )
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage.completion_tokens <= 5


def test_logprobs(client, ready):
    done = client.completions.create(
        model="small", prompt="The 天", max_tokens=6, seed=1, logprobs=2, echo=True, temperature=0
    )
    logprobs = done.choices[0].logprobs
    ids = ready.encode("The 天")
    [expected] = alone(ready, ids, max_tokens=6, seed=1, logprobs=2, temperature=0)
    assert len(logprobs.tokens) == len(ids) + len(expected.tokens)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    # Order of sums in fp32.
    assert logprobs.token_logprobs[len(ids) :] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-3
    )
    assert done.choices[0].text.startswith("The 天")
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or done.choices[0].text[offset:].startswith(token)
    chat = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "天"}], max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens and all(len(entry.top_logprobs) == 3 for entry in content)
    for entry in content:
        assert ready.tokenizer.token_bytes.index(bytes(entry.bytes)) >= 0


@pytest.mark.parametrize("num_top", [0, 1])
def test_top_logprobs_always_hold_the_token_itself(client, num_top):
    """Sampled or echoed, and however unlikely."""
    done = client.completions.create(
        model="small", prompt="The quick brown fox", echo=True, logprobs=num_top, temperature=1.5, max_tokens=20, seed=3
    )
    logprobs = done.choices[0].logprobs
    for token, logprob, tops in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        # Another id that is spelled alike may be the more likely one.
        assert tops[token] >= logprob and len(tops) <= num_top + 1
    assert any(len(tops) == num_top + 1 for tops in logprobs.top_logprobs[1:])


def test_with_a_stop_string_logprobs_end_with_the_text(client, ready):
    """Streamed, a token's log-probability comes when it is certain that the token belongs to the text."""
    asked = {"model": "small", "prompt": "The", "max_tokens": 40, "seed": 3, "logprobs": 1}
    asked["extra_body"] = {"ignore_eos": True}
    [free] = client.completions.create(**asked).choices
    starts = free.logprobs.text_offset
    for begin, end in ((10, 13), (starts[6], starts[8]), (0, 1), (len(free.text) - 3, len(free.text))):
        stop = asked["stop"] = free.text[begin:end]
        text = free.text[: free.text.index(stop)]
        [choice] = client.completions.create(**asked).choices
        assert choice.text == text and choice.finish_reason == "stop"
        assert all(offset < len(text) for offset in choice.logprobs.text_offset)
        assert choice.logprobs.tokens == free.logprobs.tokens[: sum(start < len(text) for start in starts)]
        tokens, offsets = [], []
        for chunk in client.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs:
                tokens += chunk.choices[0].logprobs.tokens
                offsets += chunk.choices[0].logprobs.text_offset
        assert (tokens, offsets) == (choice.logprobs.tokens, choice.logprobs.text_offset)
        [chat] = client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "The"}],
            max_tokens=40,
            seed=3,
            stop=[stop],
            logprobs=True,
        ).choices
        spelled = "".join(bytes(entry.bytes).decode(errors="replace") for entry in chat.logprobs.content)
        assert chat.finish_reason == "length" or len(spelled) - len(chat.message.content) < 4


def test_a_shared_beginning_is_read_once(client):
    beginning = "The quick brown fox jumps over the lazy dog. " * 4
    for question in ("And", "But", "Cats"):
        usage = client.completions.create(model="small", prompt=beginning + question, max_tokens=1).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "temperature": -1}, "temperature is -1; allowed: a number, 0 to 100"),
        ({"prompt": "a", "max_token": 1}, "'max_token' is not supported; did you mean 'max_tokens'?"),
        ({"prompt": "a", "best_of": 5}, "best_of is 5, which is not supported; leave it out"),
        ({"prompt": "a" * 20_000}, "the prompt has 20000 tokens; this server takes at most 3000"),
        ({"prompt": "a", "max_tokens": 50_001}, "max_tokens is 50001; this server gives at most 50000"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [[1], []]}, "prompt.1 is an empty list"),
        ({"prompt": [5, -1]}, "token id -1 is outside the vocabulary"),
        ({"prompt": ["a"] * 100, "n": 2}, "100 prompts times n = 2 are 200 choices; at most 128"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop holds 17 strings; at most 16"),
        ({"prompt": "\ud800"}, "; half of a surrogate pair is not text"),
        ({}, "prompt is missing; give a text, several, or token ids"),
        ({"messages": [{"role": "user", "content": "a"}]}, "'messages' is not supported"),
    ],
)
def test_bad_completions_are_explained(http, body, message):
    answer = http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code", "request_id"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty; give at least one message"),
        ([("robot", "a")], "messages.0.role"),
    ],
)
def test_bad_chats_are_explained(client, messages, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="small", messages=[{"role": role, "content": text} for role, text in messages]
        )
    assert message in caught.value.body["message"]


def test_the_client_knows_our_errors(server, client, http):
    with pytest.raises(openai.NotFoundError, match="model is 'gpt'; this server has 'small'"):
        client.completions.create(model="gpt", prompt="a")
    stranger = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.status_code == 401 and caught.value.body["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/completions"):
        assert http.get(server[0] + path, headers={"Authorization": ""}).status_code == 401
    assert http.get("/health").json()["status"] == "ok"
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="small", prompt="a" * 60_000)
    assert caught.value.status_code == 413 and "larger than 50000 bytes" in caught.value.body["message"]
    assert http.get("/v1/nothing").json()["error"]["message"].startswith("there is no such route")
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/v1/completions", content=b"{}").status_code == 415
    assert http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400


def test_a_body_that_does_not_tell_its_size_is_stopped_at_the_limit(http):
    def endless():
        for _ in range(100):
            yield b" " * 1000

    answer = http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_foreign_hosts_are_refused(http):
    """A web page elsewhere may let its own name point to this machine."""
    for host, status in (("evil.example", 403), ("localhost:1234", 200), ("127.0.0.1", 200), ("", 403)):
        assert http.get("/health", headers={"Host": host}).status_code == status


def test_no_path_reaches_the_file_system(server):
    """Sent as written: clients tidy such paths up."""
    address = server[0].removeprefix("http://").split(":")
    for path in (
        "/../../../etc/passwd", "/..%2f..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
        "/static/../../etc/passwd", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/v1/models//etc/passwd",
        "/index.html", "/assets/web/index.html", "/etc/passwd%00.html", "/file:///etc/passwd", "/\\..\\etc\\passwd",
    ):  # fmt: skip
        with socket.create_connection((address[0], int(address[1]))) as connection:
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            request += "X-Sendfile: /etc/passwd\r\nX-Original-URL: /etc/passwd\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.split()[1] in (b"404", b"400"), (path, answer[:80])
        assert b"root:" not in answer


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_slots(server, http, stream):
    """On a socket of its own: a client library has time-outs, which a busy machine exceeds."""
    address, engine = server
    body = json.dumps({"prompt": "The", "max_tokens": 50_000, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    wait_for(lambda: engine.num_active == 0)
    cancelled = engine.metrics.cancelled
    with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: engine.slots.free < 4)
    wait_for(lambda: engine.slots.free == 4 and engine.num_active == 0)
    assert engine.metrics.cancelled == cancelled + 1
    done = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 2})
    assert done.status_code == 200


def test_a_full_queue_is_429_with_a_time_to_come_back(server, http):
    address, engine = server
    body = {"max_tokens": 50_000, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=address, headers=headers, timeout=300) as visitor:
        with visitor.stream("POST", "/v1/completions", json={**body, "prompt": ["The"] * 4}) as first:
            assert first.status_code == 200
            # Before they have left the queue for their slots, there is no room in it for the eight to come.
            wait_for(lambda: engine.slots.free == 0)
            with visitor.stream("POST", "/v1/completions", json={**body, "prompt": ["The"] * 8}):
                # Each of the two requests has two slots.
                wait_for(lambda: engine.num_waiting == 6)
                refused = http.post("/v1/completions", json={"prompt": ["a"] * 8})
                assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert engine.num_waiting == 6, "none of its prompts was queued"
                never = http.post("/v1/completions", json={"prompt": ["a"] * 9})
                assert never.status_code == 400 and never.json()["error"]["param"] == "prompt"
                assert "the request has 9 prompts; the queue of this server holds 8" in never.text
                small = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
                assert small.status_code == 200, "there is room for it, in the queue and in the slots"
        wait_for(lambda: engine.num_active == 0 and engine.num_waiting == 0)


@pytest.mark.slow
def test_many_streams_at_once_are_neither_lost_nor_mixed_up(server, ready):
    """The small form of the load test: every stream is what `generate` says."""
    count, texts, failures = 12, {}, []

    def one(number):
        try:
            client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=5)
            stream = client.completions.create(
                model="small", prompt=f"The fox {number}", max_tokens=20, seed=number, stream=True
            )
            texts[number] = "".join(chunk.choices[0].text for chunk in stream)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number in range(count):
        [expected] = alone(ready, ready.encode(f"The fox {number}"), max_tokens=20, seed=number)
        assert texts[number] == expected.text


def test_metrics(http):
    assert "tnllm_slots 4" in http.get("/metrics").text.splitlines()


def test_the_files_of_the_page(server, http):
    """Without a key, all that the page loads; from this server alone, with a policy that runs nothing else."""
    address, engine = server
    names = {path.name for path in (assets.folder() / "web").iterdir()} - {"marked.LICENSE"}
    seen, todo = set(), ["/"]
    while todo:
        path = todo.pop()
        answer = httpx.get(address + path, timeout=300)
        policy = answer.headers["Content-Security-Policy"]
        assert answer.status_code == 200 and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in policy and "'unsafe" not in policy and "script-src 'self'" in policy
        seen.add(path.rpartition("/")[2] or "index.html")
        if "marked.js" not in path:
            for outside in ("http:", "https:", " src=", "@import", "url(", "style=", "<style", "onclick=", "innerHTML"):
                text = answer.text.replace("http://www.w3.org/2000/svg", "").replace(' src="page/main.js"', "")
                assert outside not in text, (path, outside)
            loaded = re.findall(r'(?:src=|from |rel="stylesheet" href=)"(?:page/|\./)([^"]+)"', answer.text)
            todo += [f"/page/{name}" for name in loaded if name not in seen]
    assert seen == names
    for name in ("x", "..%2findex.html", "marked.LICENSE", "__init__.py", "index.html/x"):
        assert http.get(f"/page/{name}").status_code == 404, name
    # What the page asks for next needs the key.
    assert httpx.get(f"{address}/props", timeout=300).status_code == 401
    assert http.get("/page.json").status_code == 404
    about = http.get("/props").json()
    assert about["model_alias"] == "small" and not about["is_demo"] and not about["is_chat_tuned"]
    assert about["limits"]["new_tokens"] == engine.max_new_tokens
    defaults = about["default_generation_settings"]["params"]
    assert defaults["temperature"] == 1.0 and defaults["max_tokens"] == 256


def test_shutting_down_is_503(ready):
    with running(ready, Settings(name="small"), num_slots=1) as (address, engine):
        engine.drain()
        wait_for(lambda: httpx.get(f"{address}/health", timeout=300).status_code == 503)
        refused = httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=300)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "10"
        assert refused.json()["error"]["code"] == "shutting_down"
