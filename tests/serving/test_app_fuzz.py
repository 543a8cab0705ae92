"""Whatever a body holds, the server answers, in OpenAI's shape, and never with a 500."""

import asyncio
import json
import re

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.small_models import make_ready
from tnllm.serving import schemas
from tnllm.serving.app import make_app
from tnllm.serving.engine import Engine
from tnllm.serving.middleware import Settings

ANY_TEXT = st.text(max_size=12) | st.sampled_from(["", "\ud800", "\0", "今天", "The", "\n\nHuman:", "e"])
NUMBERS = st.sampled_from([0, -1, 1, 2, 0.5, 1e308, -0.0, float("nan"), float("inf"), 2**63, -(2**63), 10**30])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)


def values(schema, definitions):
    """JSON that fits a schema, or nearly."""
    if "$ref" in schema:
        return values(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return st.one_of([values(option, definitions) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([values({**schema, "type": one}, definitions) for one in kind])
    if kind == "object":
        fields = {name: values(inner, definitions) for name, inner in schema.get("properties", {}).items()}
        required = {name: fields.pop(name) for name in schema.get("required", []) if name in fields}
        return st.fixed_dictionaries(required, optional=fields)
    if kind == "array":
        return st.lists(values(schema.get("items", {}), definitions), max_size=3)
    return {
        "string": ANY_TEXT,
        "integer": st.integers(0, 8) | st.integers(),
        "number": st.floats(0, 2) | NUMBERS,
        "boolean": st.booleans(),
        "null": st.none(),
    }.get(kind, ANY)


@pytest.fixture(scope="module")
def app(model, tokenizer):
    ready = make_ready(model, tokenizer)
    with Engine(ready, num_slots=4, max_new_tokens=8, max_prompt_tokens=200) as engine:
        yield make_app(engine, Settings(name="small", max_body_bytes=20_000, hosts=None))


def send(app, path, content):
    async def post():
        # Exceptions of the application come through, so a bug is seen with its traceback.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    return asyncio.run(post())


def schema_of(app, path):
    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.get("/openapi.json")).json()

    schema = asyncio.run(get())
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return body, schema["components"]["schemas"]


def check(answer):
    assert answer.status_code in (200, 400, 404, 413), answer.text
    if answer.status_code != 200:
        conforms(answer.json(), schemas.Error)
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            assert "error" not in json.loads(event.removeprefix("data: "))
    else:
        conforms(
            answer.json(),
            schemas.ChatCompletion if answer.url.path.endswith("chat/completions") else schemas.Completion,
        )


def conforms(value, schema):
    """Every key is described, and every described one is there."""
    assert schema.model_validate(value).model_dump(exclude_unset=True, by_alias=True) == value


def test_every_kind_of_answer_is_as_described(app):
    for body in (
        {"prompt": "a", "max_tokens": 2, "logprobs": 2, "echo": True},
        {"prompt": ["a", "b"], "max_tokens": 1, "n": 2},
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
        {"prompt": "a", "x": 1},
    ):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        check(send(app, path, json.dumps(body)))

    async def get(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.get(path)).json()

    conforms(asyncio.run(get("/health")), schemas.Health)
    conforms(asyncio.run(get("/v1/models")), schemas.ModelList)
    conforms(asyncio.run(get("/v1/models/small")), schemas.Model)
    document = asyncio.run(get("/openapi.json"))
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"200", "default", "500", "503"} <= set(operation["responses"])
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named and named <= set(document["components"]["schemas"])
    native = document["components"]["schemas"]["NativeRequest"]["properties"]
    assert all({"const": False} in native[key]["anyOf"] for key in ("logprobs", "n_probs"))
    ranges = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert ranges["max_tokens"]["anyOf"][0] == {"type": "integer", "minimum": -1, "maximum": 8}
    assert ranges["model"]["anyOf"] == [{"type": "string", "enum": ["small"]}, {"type": "null"}]
    assert any(option.get("maxItems") == 200 for option in ranges["prompt"]["anyOf"])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_makes_a_500(app, path):
    schema, definitions = schema_of(app, path)
    fitting = values(schema, definitions)
    spoiled = st.tuples(fitting, st.dictionaries(st.sampled_from(sorted(definitions[schema["$ref"].rpartition("/")[2]][
        "properties"])) | ANY_TEXT, ANY, max_size=2)).map(lambda pair: {**pair[0], **pair[1]})  # fmt: skip
    # Bounded, so that a body which is served is served soon.
    tame = st.sampled_from([{}, {"max_tokens": 2}, {"model": None, "max_tokens": 1, "n": 1}, {"model": None}])
    if "chat" in path:
        # Turns that fit are rare.
        tame |= st.just({"messages": [{"role": "user", "content": "The"}], "model": None})
    seen = set()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(fitting | spoiled, tame)
    def run(body, more):
        answer = send(app, path, json.dumps({**body, **more}))
        check(answer)
        seen.add(answer.status_code)

    run()
    assert {200, 400} <= seen, "the bodies were all alike"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.binary(max_size=60)
    | ANY.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"[" * 9000, b'{"prompt": "' + b"a" * 19_000 + b'"}', b" " * 20_001, b"\xff", b"1" * 5000])
)
def test_bodies_that_are_no_request(app, content):
    check(send(app, "/v1/completions", content))
