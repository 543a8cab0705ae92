"""Text that must fit a schema, an expression or a grammar; tools; logit_bias: alone, in batches, streamed, refused."""

import json
import re
import sys

import httpx
import pytest

from tests.serving.serving import running
from tests.small_models import make_ready
from tnllm.errors import MissingExtra, UserError
from tnllm.generation.decoder import generate
from tnllm.generation.grammar import GrammarError, Grammars
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Result
from tnllm.serving.generating import error_answer
from tnllm.serving.middleware import Settings

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TALK = [{"role": "user", "content": "Who?"}]
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop"}},
]
needs_library = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('llguidance')", reason="needs the extra schema"
)


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


@pytest.fixture(scope="module")
def grammars(ready):
    return Grammars(ready.tokenizer, ready.eos_ids)


@pytest.fixture(scope="module")
def server(ready):
    with (
        running(ready, Settings(name="small"), num_slots=4, max_new_tokens=4000) as (address, engine),
        httpx.Client(base_url=address, timeout=300) as client,
    ):
        yield client, engine


def is_person(text):
    person = json.loads(text)
    return set(person) == {"name", "age"} and person["name"] in ("Ann", "Bo") and 0 <= person["age"] <= 99


def refused(answer, param, message):
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), answer.text
    assert message in error["message"] and "\n" not in error["message"]


@needs_library
def test_every_text_fits_and_its_neighbours_are_as_alone(ready, grammars):
    """Rows with a schema, an expression, a grammar and a bias, decoded together with one that is free."""
    free = SamplingParams(max_tokens=40, seed=5)
    rows = [
        free,
        SamplingParams(max_tokens=200, seed=1, n=3, grammar=grammars.json_schema(PERSON)),
        SamplingParams(max_tokens=200, seed=2, grammar=grammars.regex("[0-9]{3}-(今|天)+x")),
        SamplingParams(max_tokens=200, seed=3, temperature=0, grammar=grammars.gbnf('root ::= "yes" | "no"')),
        SamplingParams(max_tokens=30, seed=4, logprobs=1, ignore_eos=True, grammar=grammars.json_schema(PERSON)),
    ]

    def results(params, size):
        prompts = ["The quick"] * len(params)
        events = generate(ready.model, ready.tokenizer, prompts, params, batch_size=size, sync_every=4)
        return {(event.index, event.sample): event for event in events if isinstance(event, Result)}

    together, alone = results(rows, 16), results(rows, 1)
    assert {key: result.tokens for key, result in together.items()} == {
        key: result.tokens for key, result in alone.items()
    }
    assert together[0, 0].tokens == results([free], 1)[0, 0].tokens
    for key in [(1, 0), (1, 1), (1, 2), (4, 0)]:
        assert is_person(together[key].text) and together[key].finish_reason == "eos"
    assert re.fullmatch("[0-9]{3}-(今|天)+x", together[2, 0].text)
    assert together[3, 0].text in ("yes", "no")


@needs_library
@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("json_schema", {"type": "thing"}, "Invalid type: thing"),
        ("json_schema", {"$ref": "http://example.org/x"}, "http://example.org/x"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("regex", "([", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "a" * 300_000, "it has 300000 characters; at most 262144"),
        ("gbnf", "root ::= (", "line 1"),
        ("gbnf", "", "No 'root' rule"),
    ],
)
def test_what_cannot_be_compiled(grammars, kind, given, message):
    with pytest.raises(UserError) as caught:
        getattr(grammars, kind)(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@needs_library
def test_a_grammar_that_grows_too_complex_ends_its_text_alone(ready, grammars, monkeypatch):
    params = SamplingParams(max_tokens=10, seed=1, grammar=grammars.regex("[a-z]+"))
    failing = params.grammar.matcher()
    mask = failing._matcher.compute_bitmask()

    class Broken:
        def compute_bitmask(self):
            return mask

        def consume_token(self, token):
            pass

        def is_stopped(self):
            return True

        def is_error(self):
            return True

        def get_error(self):
            return "too\ncomplex"

    monkeypatch.setattr(failing, "_matcher", Broken())
    monkeypatch.setattr(type(params.grammar), "matcher", lambda self: failing)
    with pytest.raises(GrammarError, match="cannot be followed any further \\(too complex\\)"):
        list(generate(ready.model, ready.tokenizer, ["The"], params))


def test_a_text_that_a_grammar_gave_up_is_a_bad_request():
    status, body, _ = error_answer(GrammarError("too complex"))
    assert (status, body["error"]["code"]) == (400, "schema_too_complex")


def test_without_the_library(ready, server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match="pip install 'tnllm\\[schema\\]'"):
        Grammars(ready.tokenizer, ready.eos_ids).regex("a")
    body = {"prompt": "a", "response_format": {"type": "json_object"}}
    answer = server[0].post("/v1/completions", json=body)
    refused(answer, "response_format", "pip install 'tnllm[schema]'")
    assert answer.json()["error"]["code"] == "schema_not_installed"


@needs_library
@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, is_person),
        ({"structured_outputs": {"json": PERSON}}, is_person),
        ({"response_format": {"type": "regex", "pattern": "ab?c"}}, lambda text: text in ("ac", "abc")),
        ({"structured_outputs": {"regex": "ab?c"}}, lambda text: text in ("ac", "abc")),
        ({"structured_outputs": {"choice": ["a.b", "今天 (x)"]}}, lambda text: text in ("a.b", "今天 (x)")),
        ({"response_format": {"type": "json_object", "schema": PERSON}}, is_person),
        # llama.cpp's keys.
        ({"json_schema": PERSON}, is_person),
        ({"grammar": 'root ::= "x" | "y"'}, lambda text: text in ("x", "y")),
        ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, lambda text: text in ("x", "y")),
    ],
)
def test_routes_give_what_fits(server, more, fits):
    client, engine = server
    before = engine.metrics.grammars
    text = client.post("/v1/completions", json={"prompt": "A", "seed": 1, "n": 2, **more}).json()
    assert all(fits(choice["text"]) and choice["finish_reason"] == "stop" for choice in text["choices"])
    chat = client.post("/v1/chat/completions", json={"messages": TALK, "seed": 2, **more}).json()["choices"][0]
    assert fits(chat["message"]["content"])
    with client.stream("POST", "/v1/completions", json={"prompt": "A", "stream": True, **more}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert fits("".join(event["choices"][0]["text"] for event in events))
    assert engine.metrics.grammars == before + 3
    assert f"tnllm_requests_with_grammar_total {before + 3}" in client.get("/metrics").text


@needs_library
def test_a_json_object_is_one(server):
    body = {"prompt": "A", "response_format": {"type": "json_object"}, "seed": 1, "max_tokens": 4000}
    choice = server[0].post("/v1/completions", json=body).json()["choices"][0]
    # A random model may write a string until its tokens end.
    assert choice["text"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"response_format": 5}, "response_format", "response_format is 5; allowed: an object whose type is text"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is null; allowed: an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
         "response_format.json_schema.schema", "is 5; allowed: a JSON schema"),
        ({"response_format": {"type": "regex", "pattern": 5}}, "response_format.pattern", "is 5; allowed: a text"),
        ({"response_format": {"type": "text", "x": 5}}, "response_format.x", "'response_format.x' is not supported"),
        ({"response_format": {"type": "text", "pattern": {}}}, "response_format", "pattern is {}; it needs another type"),
        ({"structured_outputs": {}}, "structured_outputs", "has []; give one of json, regex, choice, grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "give one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "is []; allowed: a list of texts"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs",
         "response_format and structured_outputs are both given"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias of token 5 is 101; allowed: a number, -100 to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "allowed: an object of token ids and numbers"),
        ({"logit_bias": {"9999": 1}}, "prompt", "token id 9999 is outside the vocabulary"),
        ({"logit_bias": {str(id): 0 for id in range(1025)}}, "logit_bias", "has 1025 tokens; at most 1024"),
    ],
)  # fmt: skip
def test_bad_constraints_are_explained(server, more, param, message):
    refused(server[0].post("/v1/completions", json={"prompt": "a", **more}), param, message)


@needs_library
@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        (
            {"response_format": {"type": "regex", "pattern": "(["}},
            "response_format",
            "cannot be used: at 1(8): invalid",
        ),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs", "cannot be used: Invalid type: x"),
    ],
)
def test_what_the_library_refuses_is_a_bad_request(server, more, param, message):
    answer = server[0].post("/v1/completions", json={"prompt": "a", **more})
    refused(answer, param, message)
    assert answer.json()["error"]["code"] == "invalid_schema"


def test_a_bias_bans_and_forces(server, ready):
    client, _ = server
    [forced] = ready.tokenizer.encode("e")[-1:]
    body = {"prompt": "The", "max_tokens": 5, "seed": 1, "ignore_eos": True}
    only = client.post("/v1/completions", json={**body, "temperature": 0, "logit_bias": {str(forced): 100}}).json()
    assert only["choices"][0]["text"] == ready.tokenizer.decode([forced] * 5)
    free = next(iter(
        result for result in generate(ready.model, ready.tokenizer, ["The"], ready.params(max_tokens=1, seed=1))
        if isinstance(result, Result)
    ))  # fmt: skip
    banned = {str(free.tokens[0]): -100}
    params = ready.params(max_tokens=5, seed=1, logit_bias=banned)
    [result] = [event for event in generate(ready.model, ready.tokenizer, ["The"], params) if isinstance(event, Result)]
    assert free.tokens[0] not in result.tokens
    with pytest.raises(UserError, match="logit_bias has token 9999; the vocabulary has"):
        generate(ready.model, ready.tokenizer, ["The"], ready.params(logit_bias={"9999": 1}))
    assert client.post("/v1/completions", json={**body, "max_tokens": 1, "logit_bias": banned}).json()["choices"][0][
        "text"
    ] == ready.tokenizer.decode(result.tokens[:1])


@needs_library
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "greet"}}, "required"])
def test_a_tool_is_called(server, choice):
    client, engine = server
    before = engine.metrics.tool_calls
    body = {"messages": TALK, "tools": TOOLS, "tool_choice": choice, "seed": 3, "max_tokens": 300}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    [call] = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    assert call["id"].startswith("call_") and call["type"] == "function"
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert (name == "greet" and is_person(arguments)) or (name, json.loads(arguments)) == ("stop", {})
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed:
        events = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: {")]
    parts = [part for event in events for part in event["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["function"]["name"] == name and all(part["index"] == 0 for part in parts)
    assert "".join(part["function"]["arguments"] or "" for part in parts) == arguments
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert engine.metrics.tool_calls == before + 2
    # What was sent comes back, with what the tool gave.
    talk = [*TALK, answer["message"], {"role": "tool", "tool_call_id": call["id"], "content": "Hello."}]
    again = client.post("/v1/chat/completions", json={"messages": talk, "max_tokens": 2})
    assert again.status_code == 200, again.text
    prompt = client.post("/apply-template", json={"messages": talk}).json()["prompt"]
    assert arguments in prompt and "Human:\nHello.\nAssistant:\n" in prompt


@needs_library
def test_a_call_that_is_cut_is_no_call(server):
    body = {"messages": TALK, "tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 2, "seed": 1}
    choice = server[0].post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"


@needs_library
def test_references_of_tools_lead_into_their_own_schemas(server):
    parameters = {
        "type": "object", "properties": {"who": {"$ref": "#/$defs/name"}}, "required": ["who"],
        "additionalProperties": False, "$defs": {"name": {"enum": ["Cy"]}},
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
    body = {"messages": TALK, "tools": tools, "tool_choice": "required", "max_tokens": 300, "seed": 1}
    answer = server[0].post("/v1/chat/completions", json=body).json()
    assert json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]) == {"who": "Cy"}


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"tools": TOOLS}, "tool_choice", "tool_choice is 'auto'; this model's chat template has no tools"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "tool_choice", "this model's chat template has no tools"),
        ({"tool_choice": "required"}, "tool_choice", "it needs tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "is 'always'; allowed: none, required, or {"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
         "is 'x'; tools has greet, stop"),
        ({"tools": {"type": "function"}}, "tools", "allowed: a list of up to 128 tools"),
        ({"tools": [5], "tool_choice": "required"}, "tools.0", "tools.0 is 5; allowed: an object"),
        ({"tools": [{"type": "web"}], "tool_choice": "required"}, "tools.0.type", "is 'web'; allowed: function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}], "tool_choice": "required"},
         "tools.0.function.name", "is 'a b'; allowed: 1 to 64 letters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}], "tool_choice": "required"},
         "tools.0.function.parameters", "is 5; allowed: a JSON schema"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tools",
         "response_format and tools are both given"),
    ],
)  # fmt: skip
def test_tools_that_are_not_called_are_refused_by_name(server, more, param, message):
    refused(server[0].post("/v1/chat/completions", json={"messages": TALK, **more}), param, message)
