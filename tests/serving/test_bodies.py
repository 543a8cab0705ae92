"""What a body may hold: what asks for nothing is accepted, what asks for what is missing is refused by name, fast."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
from pydantic_core import from_json

from tests.small_models import make_ready
from tnllm.generation.samples import TokenLogprob
from tnllm.serving import api, bodies
from tnllm.serving.answers import ChatAnswer, TextAnswer
from tnllm.serving.api import ChatRequest, CompletionRequest, check_size, validated
from tnllm.serving.bodies import RequestError

TALK = [{"role": "user", "content": "a"}]
BEGUN = [*TALK, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    return make_ready(model, tokenizer)


def asked(kind, body):
    return validated(kind, json.dumps(body).encode())


@pytest.mark.parametrize(
    "more",
    [
        {"best_of": 1},
        {"best_of": 0},
        {"best_of": 3, "n": 3},
        {"logit_bias": {}},
        {"logit_bias": {"5": 0, "6": 0.0}},
        {"suffix": ""},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [], "function_call": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"min_tokens": 0, "use_beam_search": False, "stop_token_ids": [], "skip_special_tokens": True},
        {"cache_prompt": False, "typical_p": 1, "typ_p": 1.0, "mirostat": 0, "mirostat_tau": 5.0, "repeat_penalty": 1},
        {"reasoning_effort": "low", "verbosity": "high", "prompt_cache_retention": "24h", "user": "me", "store": True},
        {"n_probs": 0, "grammar": "", "samplers": [], "lora": [], "guided_choice": None, "bad_words": []},
        {"chat_template_kwargs": {"enable_thinking": False}, "thinking": {"type": "disabled"}},
        {"reasoning": {"effort": "low"}, "enable_thinking": False},
        {"t_max_predict_ms": 0, "min_keep": 0, "penalty_last_n": 0, "repetition_penalty_range": 0},
        {"chat_template_kwargs": {}, "documents": [], "include_stop_str_in_output": False, "length_penalty": 1.0},
        {"do_sample": True},
        {"do_sample": False, "temperature": 0},
        {"repeat_last_n": 64},
        {"tools": None, "anything": None, "nothing_of_ours": False, "neither": {}},
    ],
)
def test_what_asks_for_nothing_is_accepted(ready, more):
    for kind, body in ((CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": TALK})):
        own = {key: value for key, value in more.items() if key in kind.model_fields}
        assert asked(kind, {**body, **more}).params(ready) == asked(kind, {**body, **own}).params(ready)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"best_of": 2}, "best_of"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": False}, "min_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"detokenize": False}, "detokenize"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"mirostat": 2}, "mirostat"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"repeat_last_n": 64, "presence_penalty": 1}, "repeat_last_n"),
        ({"repeat_last_n": 64, "repetition_penalty": 1.2}, "repeat_last_n"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"do_sample": False}, "do_sample"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"anything": 1}, "anything"),
        # Off, but of a key that was meant to be another.
        ({"temprature": False}, "temprature"),
    ],
)
def test_what_asks_for_what_is_missing_is_refused_by_name(more, name):
    for kind, body in ((CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": TALK})):
        with pytest.raises(RequestError) as caught:
            asked(kind, {**body, **more})
        assert caught.value.param == name and name in str(caught.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": 7.0, "seed": -1}, {"max_tokens": 7}),
        ({"top_p": 0}, {"temperature": 0}),
        ({"top_p": 0.0, "temperature": 0.7}, {"temperature": 0}),
        ({"logprobs": False}, {}),
        ({"stop": []}, {}),
        ({"stop": "x"}, {"stop": ("x",)}),
    ],
)
def test_off_values_of_our_own_keys(ready, more, expected):
    assert asked(CompletionRequest, {"prompt": "a", **more}).params(ready) == ready.params(**expected)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        # Each of these would be an answer of gigabytes.
        ({"echo": True, "logprobs": 20, "n": 128, "max_tokens": 0}, "logprobs", "may have 1344000 log-probabilities"),
        ({"logprobs": 20, "n": 128, "max_tokens": 60_000}, "logprobs", "may have 161280000 log-probabilities"),
        ({"echo": True, "n": 128, "max_tokens": 0, "prompt": [[5] * 9000]}, "echo", "would repeat 1152000 tokens"),
        ({"n": 128, "prompt": [[5], [6]]}, "n", "2 prompts times n = 128 are 256 choices; at most 128"),
        ({"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [5] * (1 << 20)}, None, ""),
        ({"logprobs": 20, "n": 128, "max_tokens": 256}, None, ""),
        ({"echo": True, "logprobs": 1, "max_tokens": 1, "prompt": [[5] * 4000] * 128}, None, ""),
        ({"n": 128, "max_tokens": 60_000, "prompt": [5] * 100_000}, None, ""),
    ],
)
def test_the_size_of_an_answer_is_bounded(ready, more, param, message):
    request = asked(CompletionRequest, {"prompt": [5] * 500, **more})
    prompts, params = request.prompts(ready), request.params(ready)
    if param is None:
        check_size(request, prompts, params)
        return
    with pytest.raises(RequestError, match=message) as caught:
        check_size(request, prompts, params)
    assert caught.value.param == param
    chat = asked(ChatRequest, {"messages": TALK, "logprobs": True, "top_logprobs": 20, "n": 128, "max_tokens": 60_000})
    with pytest.raises(RequestError, match="log-probabilities"):
        check_size(chat, chat.prompts(ready), chat.params(ready))


def test_the_default_gives_way_to_the_limit(ready):
    request = asked(CompletionRequest, {"prompt": "a"})
    assert request.params(ready).max_tokens == 256 and request.params(ready, 100).max_tokens == 100
    assert asked(ChatRequest, {"messages": TALK}).params(ready, 100).max_tokens == 100
    with pytest.raises(RequestError, match=r"max_tokens is 9+\.\.\.9+; this server"):
        asked(CompletionRequest, {"prompt": "a", "max_tokens": 10**4000 - 1}).params(ready, 100)
    for key in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(RequestError, match="max_tokens is 101; this server gives at most 100") as caught:
            asked(ChatRequest, {"messages": TALK, key: 101}).params(ready, 100)
        assert caught.value.param == "max_tokens"
    both = asked(ChatRequest, {"messages": TALK, "max_tokens": 2, "max_completion_tokens": -1})
    assert both.params(ready).max_tokens == 2


@pytest.mark.parametrize(
    "message",
    [
        {"content": "b", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"content": "b", "refusal": "", "annotations": [{"type": "url_citation", "url": "x"}], "tool_calls": []},
        {"content": "b", "reasoning_content": "Hm.", "reasoning": None, "provider_specific_fields": {"refusal": None}},
        {"content": [{"type": "text", "text": "b", "annotations": [], "logprobs": None}], "id": "msg_1"},
        {"content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"content": "b", "cache_control": {"type": "ephemeral"}, "name": "bot", "parsed": {"a": 1}, "images": []},
        {"content": "b", "prefix": True},
    ],
)
def test_its_own_answers_and_those_of_others_are_accepted_as_messages(ready, message):
    plain = asked(ChatRequest, {"messages": BEGUN}).prompts(ready)
    assert asked(ChatRequest, {"messages": [*TALK, {"role": "assistant", **message}]}).prompts(ready) == plain


def test_an_assistant_message_may_have_no_text(ready):
    empty = asked(ChatRequest, {"messages": [*TALK, {"role": "assistant", "content": ""}, *TALK]}).prompts(ready)
    for message in ({"content": None, "refusal": None}, {"tool_calls": []}, {"content": []}):
        messages = [*TALK, {"role": "assistant", **message}, *TALK]
        assert asked(ChatRequest, {"messages": messages}).prompts(ready) == empty


@pytest.mark.parametrize(
    ("message", "explanation"),
    [
        ({"role": "robot", "content": "a"}, "messages.0.role is 'robot'; allowed: system, developer, user, assistant"),
        ({"role": "tool", "content": None}, "messages.0.content is null"),
        ({"role": "tool", "content": "a", "tool_call_id": {}}, "messages.0.tool_call_id is {}; allowed: a text"),
        ({"role": "assistant", "content": "a", "tool_calls": {}}, "messages.0.tool_calls is {}; allowed: a list"),
        ({"role": "assistant", "tool_calls": "f"}, "messages.0.tool_calls is 'f'; allowed: a list of calls"),
        ({"role": "user"}, "messages.0.content is null; allowed: a text, or a list of parts"),
        ({"role": "user", "content": 5}, "messages.0.content is 5"),
        ({"role": "user", "content": [5]}, "messages.0.content.0 is 5"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.type is 'image_url'; allowed: text"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text is null"),
        ({"role": "assistant", "content": "a", "refusal": "No."}, "messages.0.refusal"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "a", "prefix": True}, "messages.0.prefix is true, which is not supported"),
        (5, "messages.0 is 5; allowed: an object with role and content"),
    ],
)  # fmt: skip
def test_messages_that_do_not_fit_are_explained(message, explanation):
    with pytest.raises(RequestError) as caught:
        asked(ChatRequest, {"messages": [message]})
    assert explanation in str(caught.value) and caught.value.param in explanation


def test_an_answer_is_continued_only_where_one_was_begun(ready):
    for body in (
        {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": TALK, "continue_final_message": False, "add_generation_prompt": True},
    ):
        asked(ChatRequest, body)
    for key, value in (("continue_final_message", False), ("add_generation_prompt", True)):
        with pytest.raises(RequestError, match=key):
            asked(ChatRequest, {"messages": BEGUN, key: value})
        with pytest.raises(RequestError, match=key):
            asked(ChatRequest, {"messages": TALK, key: not value})


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "prompt is missing; give a text, several, or token ids", "prompt"),
        ({"prompt": None}, "prompt is missing", "prompt"),
        ({"prompt": 5}, "prompt is 5; allowed: a text, a list of texts, token ids", "prompt"),
        ({"prompt": [5, "a"]}, "prompt.1 is 'a'; token ids are whole numbers", "prompt"),
        ({"prompt": [[5], [True]]}, "prompt.1.0 is true; token ids are whole numbers", "prompt"),
        ({"prompt": ["a", [5]]}, "prompt.1 is [5]; allowed for prompt: ", "prompt"),
        ({"prompt": ["a"] * 129}, "prompt holds 129 prompts; at most 128", "prompt"),
        ({"prompt": "a", "temperature": "warm"}, "temperature is 'warm'; allowed: a number, 0 to 100", "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan; allowed: a number", "temperature"),
        ({"prompt": "a", "repetition_penalty": 0}, "is 0; allowed: a number above 0, up to 100", "repetition_penalty"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens is -2; allowed: a whole number, -1 or more", "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5; allowed: a whole number", "max_tokens"),
        ({"prompt": "a", "n": True}, "n is true; allowed: a whole number, 1 to 128", "n"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21; allowed: a whole number, 0 to 20", "logprobs"),
        ({"prompt": "a", "stream": 1}, "stream is 1; allowed: true or false", "stream"),
        ({"prompt": "a", "model": 1}, "model is 1; allowed: a text", "model"),
        ({"prompt": "a", "seed": 2**63}, "allowed: a whole number, -1 to 9223372036854775807", "seed"),
        ({"prompt": "a", "stop": ""}, "stop holds ''; allowed: texts of 1 to 1024 characters", "stop"),
        ({"prompt": "a", "stop": ["b" * 1025]}, "; allowed: texts of 1 to 1024 characters", "stop"),
        ({"prompt": "a", "stop": 5}, "stop is 5; allowed: a text, or a list of up to 16 texts", "stop"),
        ({"prompt": "a", "stream_options": 5}, "stream_options is 5; allowed: an object", "stream_options"),
        ({"prompt": "a", "x" * 9000: 1}, "x... is not supported", None),
        ({"prompt": {"a" * 9000: 1}}, "prompt is {'aaa", "prompt"),
    ],
)
def test_an_error_names_the_key_and_the_rule(body, message, param):
    with pytest.raises(RequestError) as caught:
        asked(CompletionRequest, body)
    assert message in str(caught.value).replace("'is", "is").replace("...'", "...")
    assert param is None or caught.value.param == param
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON: EOF"),
        (b"\xff", "the body is not valid JSON"),
        (b"[" * 5000, "the body is not valid JSON: recursion limit"),
        (b"5", "the body is 5; it must be a JSON object"),
        (b'{"seed":' + b"1" * 5000 + b"}", "the body is not valid JSON: number out of range"),
        (b'{"a":"\\ud83d"}', "half of a surrogate pair is not text"),
    ],
)
def test_bodies_that_are_no_object_are_explained(content, message):
    with pytest.raises(RequestError, match=message):
        bodies.read(content)


def test_the_structure_of_a_body_is_bounded_before_it_is_built():
    for content in (
        b'{"prompt":[' + b"[]," * 100_000 + b"[]]}",
        b'{"prompt":[' + b'"",' * 100_000 + b'""]}',
        b"{" + b'"a":0,' * 100_000 + b'"b":0}',
        b'{"' + b"[" * 200_000 + b'":[' + b"{}," * 100_000 + b"{}]}",
    ):
        with pytest.raises(RequestError, match=r"the body has \d+ strings, arrays and objects; at most 100000"):
            bodies.read(content)
    with pytest.raises(RequestError, match="the body has 201 keys; at most 200"):
        bodies.read(json.dumps(dict.fromkeys(map(str, range(201)), 0)).encode())
    # Brackets, commas and quotes in a text are text.
    text = '[{:,"\\' * 60_000
    assert bodies.read(json.dumps({"prompt": text}).encode(), most_tokens=10) == {"prompt": text}
    numbers = json.dumps({"prompt": [5] * 150_000}).encode()
    assert len(bodies.read(numbers, most_tokens=50_000)["prompt"]) == 150_000
    with pytest.raises(
        RequestError, match="the body has 150000 values; at most 149998: send long prompts one at a time"
    ):
        bodies.read(numbers, most_tokens=49_998)


LONG = ", ".join(map(str, range(20_000)))


@pytest.mark.parametrize(
    ("content", "is_sliced"),
    [
        (f'{{"prompt": [{LONG}], "n": 2}}', True),
        (f'{{"n": 2, "prompt": [[{LONG}], [5], [{LONG}]]}}', True),
        (f'{{"prompt": [5, "a", null, 1.5, "],[", "\\"[", {LONG}]}}', True),
        (f'{{"user": "\\\\", "prompt": [{LONG}]}}', True),
        (f'{{"prompt": "[{LONG}]"}}', False),
        (f'{{"prompt": [{LONG}, {{"a": 5}}, {LONG}]}}', False),
        (f'{{"stop": [{LONG}], "prompt": [{LONG}]}}', False),
        (f'{{"prompt": [{LONG}], "prompt": [5]}}', False),
        (f'{{"prompt": {{"prompt": [{LONG}]}}}}', False),
        (f"[{LONG}]", False),
        (f'{{"prompt": [{LONG}, ]}}', False),
        (f'{{"prompt": [{LONG},, {LONG}]}}', False),
        (f'{{"prompt": [{"," * 90_000}]}}', False),
        (f'{{"prompt": [{LONG}, 05]}}', False),
        (f'{{"prompt": [{LONG}}}', False),
        (f'{{"prompt": [{" " * 90_000}]}}', False),
        (f'{{"prompt": [{"5" * 90_000}]}}', False),
    ],
)
def test_long_lists_are_parsed_in_slices_as_if_at_once(monkeypatch, content, is_sliced):
    """No other thread, so not /health either, runs while a slice is parsed."""
    sizes = []

    def watched(part):
        sizes.append(len(part))
        return from_json(part)

    def outcome(parse):
        try:
            return parse(content.encode())
        except ValueError as error:
            return str(error)

    monkeypatch.setattr(bodies, "from_json", watched)
    assert outcome(lambda part: bodies._parse(part, *bodies._structure(part)[1:])) == outcome(from_json)
    assert (max(sizes) < 40_000) == is_sliced


def test_the_time_to_refuse_does_not_grow_with_the_wrong_values():
    """Against reading right ones: an error for each wrong value took a hundred times as long."""

    def seconds(content, refused):
        best = float("inf")
        for _ in range(3):
            start = time.thread_time()
            if refused:
                with pytest.raises(RequestError):
                    validated(CompletionRequest, content)
            else:
                validated(CompletionRequest, content)
            best = min(best, time.thread_time() - start)
        return best

    ids = b'{"prompt":[' + b"5.5," * 200_000
    right = seconds(ids.replace(b".5", b"") + b"5]}", refused=False)
    assert seconds(ids + b"5]}", refused=True) < 10 * right
    assert seconds(b'{"prompt":[5,' + ids[11:] + b"5]}", refused=True) < 10 * right
    assert seconds(b'{"' + b"a" * 1_000_000 + b'":1}', refused=True) < 10 * right


def test_texts_are_read_only_as_far_as_shows_that_they_are_too_long(ready, monkeypatch):
    read, encode = [], type(ready.tokenizer)._encode
    monkeypatch.setattr(type(ready.tokenizer), "_encode", lambda self, text: read.append(text) or encode(self, text))
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    parts = [{"role": "user", "content": text[start : start + 90_000]} for start in range(0, len(text), 90_000)]
    for request, param in (
        (asked(CompletionRequest, {"prompt": ["a", text]}), "prompt"),
        (asked(ChatRequest, {"messages": parts}), "messages"),
    ):
        read.clear()
        with pytest.raises(
            RequestError, match=f"{param} has .* or more tokens; this server takes at most 2500"
        ) as caught:
            request.prompts(ready, 250_000)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == param
        assert sum(map(len, read)) < len(text) and max(map(len, read)) <= 1 << 16


def test_ids_with_one_spelling_and_control_tokens_are_told_apart(ready):
    """The letter and its fallback byte are spelled alike; control tokens have no text."""
    tokenizer = ready.tokenizer
    letter, byte = tokenizer.encode("a")[0], tokenizer.backend.piece_to_id("<0x61>")
    tops = [(letter, -0.1), (tokenizer.eos_id, -3.0), (byte, -9.0), (tokenizer.bos_id, -12.0)]
    entry = TokenLogprob(letter, "a", -0.1, tuple(TokenLogprob(id, "", logprob) for id, logprob in tops))
    request = asked(CompletionRequest, {"prompt": "x", "logprobs": 4})
    answer = TextAnswer(ready, "m", "fp", request, request.prompts(ready), request.params(ready))
    logprobs = answer._choice(0, "a", [entry], None)["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.1, "</s>": -3.0, "<s>": -12.0}]
    request = asked(ChatRequest, {"messages": TALK, "logprobs": True, "top_logprobs": 4})
    answer = ChatAnswer(ready, "m", "fp", request, request.prompts(ready), request.params(ready))
    [content] = answer._choice(0, "a", [entry], None)["logprobs"]["content"]
    assert [top["token"] for top in content["top_logprobs"]] == ["a", "</s>", "a", "<s>"]


def test_a_sampling_option_that_requests_do_not_offer_keeps_its_default(monkeypatch):
    """A new rule of the sampler alone must not break the server."""
    unknown = SimpleNamespace(name="rule_of_tomorrow")
    monkeypatch.setattr(api, "fields", lambda kind: (*dataclasses.fields(kind), unknown))
    loaded = SimpleNamespace(params=lambda **given: given)
    given = CompletionRequest.model_validate({"prompt": "a", "top_k": 3}).params(loaded)
    assert given["top_k"] == 3 and "rule_of_tomorrow" not in given
