"""The JSON body of a request: read within bounds, freed of what asks for nothing, explained where it does not fit.

    values = read(content)                                   # bytes → dict; raises RequestError
    values = without_neutral(values, REQUEST, allowed=CompletionRequest.model_fields)
    try: CompletionRequest.model_validate(values)
    except ValidationError as error: raise explained(error, CompletionRequest, {})

Everything here may hold the interpreter for as long as a body of the largest size takes, so a server calls it on another
thread than its event loop's, and the bounds come before the work.
"""

import codecs
import reprlib
import uuid
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import from_json

from tnllm.chat_template import ROLES
from tnllm.errors import UserError, did_you_mean

# Arrays, objects and strings (keys among them) of one body, and keys of its outermost object. A conversation of ten
# thousand messages has fewer; each takes as much memory as a hundred characters of text.
MAX_PARTS, MAX_KEYS = 100_000, 200
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_PROMPTS, MAX_MESSAGES = 16, 1024, 128, 10_000

# Bytes of a list that are parsed at once, in less than a millisecond.
_SLICE = 1 << 14

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = 4


class RequestError(UserError):
    """A request that is refused. `param` is the key, `code` and `type` OpenAI's names; the others are HTTP's."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.headers, self.type = param, code, status, dict(headers or {}), type


# The id of the request that is being answered, on its own task and the threads that work for it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)


def error_body(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape, and the request's id if it has one."""
    error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}
    if (id := REQUEST_ID.get()) is not None:
        error["request_id"] = id
    return {"error": error}


def shown(value: Any) -> str:
    """A value as it is quoted in a message: at most a line of it, and JSON's words for true, false and null."""
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else _SHORT.repr(value)


def typed(value: Any, kind: type[Any] | tuple[type, ...], where: str, allowed: str) -> Any:
    """The value, if it is of that kind. Raises RequestError."""
    if not isinstance(value, kind):
        raise RequestError(f"{where} is {shown(value)}; allowed: {allowed}", where)
    return value


def read(content: bytes, most_tokens: int | None = None) -> dict[str, Any]:
    """The object that a body holds; `most_tokens` is that of a prompt. Raises RequestError."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content[:4]:
        # JSON begins with two ASCII characters, and escapes this byte.
        raise RequestError("the body is UTF-16 or UTF-32; send it in UTF-8", code="invalid_json")
    parts, commas, brackets = _structure(content)
    if parts > MAX_PARTS:
        message = f"the body has {parts} strings, arrays and objects; at most {MAX_PARTS}"
        raise RequestError(message, code="body_too_complex")
    if most_tokens is not None and len(commas) > most_tokens + MAX_PARTS:
        most = most_tokens + MAX_PARTS
        message = f"the body has {len(commas) + 1} values; at most {most}: send long prompts one at a time"
        raise RequestError(message, code="body_too_complex")
    try:
        value = _parse(content, commas, brackets)
    except ValueError as error:
        hint = "; half of a surrogate pair is not text" if "hex escape" in str(error) else ""
        raise RequestError(f"the body is not valid JSON: {error}{hint}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {shown(value)}; it must be a JSON object")
    if len(value) > MAX_KEYS:
        raise RequestError(f"the body has {len(value)} keys; at most {MAX_KEYS}", code="body_too_complex")
    return value


def _structure(content: bytes) -> tuple[int, np.ndarray, np.ndarray]:
    """Before any value takes memory: how many strings, arrays and objects; where commas and brackets are, none in strings.

    Other threads run while NumPy works.
    """
    # An escaped quote ends no string. The length stays, so that positions do.
    data = np.frombuffer(content.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
    quotes = data == ord('"')
    outside = ~np.bitwise_xor.accumulate(quotes)
    # With this bit [ is {, and ] is }.
    folded = data | 0x20
    opening = outside & (folded == ord("{"))
    parts = int(quotes.sum()) // 2 + int(opening.sum())
    closing = outside & (folded == ord("}"))
    return parts, np.flatnonzero(outside & (data == ord(","))), np.flatnonzero(opening | closing)


def _parse(content: bytes, commas: np.ndarray, brackets: np.ndarray) -> Any:
    """What JSON says. A long list of ids in the prompt is parsed in slices, since no other thread runs during one."""
    lists: dict[str, list[Any]] = {}
    rest, end, mark = [], 0, uuid.uuid4().hex
    try:
        for index in np.flatnonzero(np.diff(brackets) > _SLICE).tolist():
            start, after = int(brackets[index]), int(brackets[index + 1]) + 1
            if content[start : start + 1] + content[after - 1 : after] == b"[]":
                name = f"{mark}{start}"
                lists[name] = _parse_list(content, start, after - 1, commas)
                rest += [content[end:start], f'"{name}"'.encode()]
                end = after
        value: Any = from_json(b"".join([*rest, content[end:]])) if lists else None
    except ValueError:
        # Positions in the message shall be those of the body.
        return from_json(content)
    for key in ("prompt", "tokens"):
        given = value.get(key) if isinstance(value, dict) else None
        if isinstance(given, str):
            value[key] = lists.pop(given, given)
        elif isinstance(given, list):
            value[key] = [lists.pop(one, one) if isinstance(one, str) else one for one in given]
    return value if value is not None and not lists else from_json(content)


def _parse_list(content: bytes, start: int, end: int, commas: np.ndarray) -> list[Any]:
    """The list without inner ones whose brackets are at `start` and `end`. Raises ValueError."""
    values: list[Any] = []
    while start < end:
        index = int(np.searchsorted(commas, start + _SLICE))
        comma = int(commas[index]) if index < len(commas) else end
        cut = min(comma, end)
        part = from_json(b"[" + content[start + 1 : cut] + b"]")
        if not part:
            raise ValueError("nothing between commas")
        values += part
        start = cut
    return values


@dataclass(frozen=True)
class Neutral:
    """The values of a key that ask for nothing: whether a value does, given the whole object; and as a JSON schema.

    Where other keys decide, the schema holds what is neutral beside some of them.
    """

    holds: Callable[[Any, Mapping[str, Any]], bool]
    schema: dict[str, Any]


# For keys of which no value changes an answer: bookkeeping, hints, and settings of what is off anyway.
_NEVER = Neutral(lambda value, values: True, {})


def _same(value: Any, one: Any) -> bool:
    """As in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(one, bool) and bool(value == one)


def _one_of(*allowed: Any) -> Neutral:
    """For keys of which only these values ask for nothing."""
    return Neutral(lambda value, values: any(_same(value, one) for one in allowed), {"enum": [*allowed, None]})


def _not_called(value: Any, values: Mapping[str, Any]) -> bool:
    """Tools that the answer must not call."""
    return value == [] or values.get("tool_choice", values.get("function_call")) == "none"


def _is_begun(value: Any, values: Mapping[str, Any]) -> bool:
    """Whether the last message is the assistant's, which is always continued."""
    messages = values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(value, bool) and value == (isinstance(last, dict) and last.get("role") == "assistant")


def _penalties_reach_far_back(value: Any, values: Mapping[str, Any]) -> bool:
    repeats = values.get("repetition_penalty", 1) != 1
    return value == -1 or not (repeats or values.get("presence_penalty") or values.get("frequency_penalty"))


_BOOLEAN = {"type": ["boolean", "null"]}


def _names(keys: str, neutral: Neutral) -> dict[str, Neutral]:
    return dict.fromkeys(keys.split(), neutral)


# OpenAI's keys, and those of other servers (vLLM, llama.cpp, TGI), that ask for nothing with some values. A key that is
# neither here nor ours is refused unless its value is off.
REQUEST: dict[str, Neutral] = {
    **_names(
        "user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier prediction "
        "parallel_tool_calls reasoning_effort verbosity include_reasoning cache_prompt request_id priority use_cache "
        "mirostat_tau mirostat_eta xtc_threshold dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers "
        "dynatemp_exponent spaces_between_special_tokens return_progress timings_per_token id_slot add_special_tokens "
        "chat_template_content_format chat_template_kwargs reasoning stream_interval",
        _NEVER,
    ),
    **_names("tools functions", Neutral(_not_called, {"type": ["array", "null"]})),
    **_names("tool_choice function_call", _one_of("none", "auto")),
    **_names(
        "top_a typical min_tokens min_length n_probs n_keep n_discard mirostat dry_multiplier xtc_probability "
        "dynatemp_range top_n_sigma smoothing_factor no_repeat_ngram_size n_indent epsilon_cutoff eta_cutoff "
        "penalty_alpha t_max_predict_ms min_keep n_cache_reuse",
        _one_of(0, -1),
    ),
    **_names(
        "typical_p typ_p tfs_z tfs repeat_penalty length_penalty num_beams guidance_scale cfg_scale "
        "encoder_repetition_penalty",
        _one_of(1),
    ),
    **_names("n_predict max_new_tokens thinking_budget_tokens", _one_of(-1)),
    **_names("skip_special_tokens detokenize add_bos_token", _one_of(True)),
    "modalities": _one_of([], ["text"]),
    "best_of": Neutral(
        lambda value, values: any(_same(value, one) for one in (0, 1, values.get("n", 1))),
        {"type": ["integer", "null"]},
    ),
    "suffix": _one_of(""),
    **_names("repeat_last_n penalty_last_n repetition_penalty_range", Neutral(_penalties_reach_far_back, {})),
    "thinking": _one_of({"type": "disabled"}),
    "do_sample": Neutral(
        lambda value, values: isinstance(value, bool) and value == (values.get("temperature") != 0), _BOOLEAN
    ),
    "continue_final_message": Neutral(_is_begun, _BOOLEAN),
    "add_generation_prompt": Neutral(
        lambda value, values: isinstance(value, bool) and _is_begun(not value, values), _BOOLEAN
    ),
    # Off by being absent: an empty object asks for them.
    **_names("web_search_options guided_json", _one_of()),
}
MESSAGE: dict[str, Neutral] = {
    **_names(
        "name id reasoning_content reasoning reasoning_details thinking thinking_blocks cache_control annotations parsed "
        "provider_specific_fields additional_kwargs response_metadata usage_metadata metadata status weight",
        _NEVER,
    ),
    # A last message of the assistant is continued anyway.
    **_names(
        "prefix partial",
        Neutral(
            lambda value, values: value is False or (value is True and values.get("role") == "assistant"), _BOOLEAN
        ),
    ),
}
PART: dict[str, Neutral] = _names("cache_control annotations id metadata", _NEVER)
# What switches off a key that is not known.
OFF = _one_of(False, "", [], {})


TEXT: dict[str, Any] = {"type": "string"}


def object_schema(
    required: str = "", neutral: Mapping[str, Neutral] | None = None, **properties: dict[str, Any]
) -> dict[str, Any]:
    """The JSON schema of an object whose optional keys may be null; `neutral`: from which `without_neutral` drops these."""
    needed = required.split()
    for key in properties.keys() - needed:
        properties[key] = {"anyOf": [properties[key], {"type": "null"}]}
    schema: dict[str, Any] = {"type": "object", "required": needed, "properties": properties}
    if neutral is None:
        return schema
    known = {key: dict(value.schema) for key, value in neutral.items()} | properties
    return schema | {"properties": known, "additionalProperties": dict(OFF.schema)}


def without_neutral(
    values: Mapping[str, Any], neutral: Mapping[str, Neutral], allowed: Collection[str], where: str = ""
) -> dict[str, Any]:
    """`values` without what asks for nothing: null, neutral values, and an unknown key that is switched off.

    Raises RequestError for a key not `allowed` that asks for something; `where` precedes its name, such as "messages.0.".
    """
    values = {key: value for key, value in values.items() if value is not None}
    kept = {}
    for key, value in values.items():
        name = where + (key if len(key) <= 64 else key[:60] + "...")
        if key in allowed:
            kept[key] = value
        elif key in neutral:
            if not neutral[key].holds(value, values):
                raise RequestError(f"{name} is {shown(value)}, which is not supported; leave it out", name)
        elif not OFF.holds(value, values) or did_you_mean(key[:64], allowed, cutoff=0.8):
            hint = did_you_mean(key[:64], allowed)
            raise RequestError(f"{name!r} is not supported{hint}; allowed: {', '.join(allowed)}", name)
    return kept


class Body(BaseModel):
    """The keys of a request. What asks for nothing is dropped, and any other unknown key refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return without_neutral(cls._translated(values), cls.neutral, cls.model_fields)

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Another server's keys as ours. Raises RequestError."""
        return values


def explained(error: ValidationError, model: type[BaseModel], names: Mapping[str, str]) -> RequestError:
    """A scalar that does not fit its key, as what was given and what is allowed. names: those given for keys."""
    [first, *_] = error.errors(include_url=False, include_context=False)
    key = str(first["loc"][0])
    rule = _rule(model.model_json_schema()["properties"][key])
    key = names.get(key, key)
    if first["type"] == "missing":
        return RequestError(f"{key} is missing; give {rule}", key)
    return RequestError(f"{key} is {shown(first['input'])}; allowed: {rule}", key)


def _rule(schema: dict[str, Any]) -> str:
    """What a schema allows, in words."""
    description = schema.get("description", "")
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    schema = options[0]
    if len(options) > 1 or schema.get("type") == "array":
        return str(description)
    if schema.get("type") not in ("integer", "number"):
        return {"boolean": "true or false", "string": "a text"}[schema["type"]]
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return f"{kind} above {schema['exclusiveMinimum']:g}, up to {high:g}"
    return f"{kind}, {low} or more" if high is None else f"{kind}, {low} to {high}"


def whole(value: Any) -> Any:
    """JSON does not tell 5.0 from 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
_SEVERAL: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
PROMPT = {"anyOf": [TEXT, _SEVERAL | {"items": TEXT}, _IDS, _SEVERAL | {"items": _IDS}]}
_STOP = TEXT | {"minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
STOP = {"anyOf": [_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}]}


def check_prompt(given: Any) -> Any:
    """Types only, as fast as they can be told; the engine checks lengths and ids."""
    rule = "a text, a list of texts, token ids, or a list of lists of token ids"
    if isinstance(given, str):
        return given
    typed(given, list, "prompt", rule)
    if not given or type(given[0]) is int:
        return _check_ids(given, "prompt")
    if len(given) > MAX_PROMPTS:
        raise RequestError(f"prompt holds {len(given)} prompts; at most {MAX_PROMPTS} in one request", "prompt")
    kind = type(given[0])
    for index, one in enumerate(given):
        if type(one) is not kind or kind not in (str, list):
            raise RequestError(f"prompt.{index} is {shown(one)}; allowed for prompt: {rule}", "prompt")
        if kind is list:
            _check_ids(one, f"prompt.{index}")
    return given


def check_tokens(given: Any) -> list[int]:
    """A list of token ids, which may be empty. Raises RequestError."""
    typed(given, list, "tokens", "a list of token ids")
    return _check_ids(given, "tokens") if given else []


def _check_ids(ids: list[Any], where: str) -> list[Any]:
    if not ids:
        raise RequestError(f'{where} is an empty list; give a text, "" to start from nothing', "prompt")
    # In slices, since no other thread runs during one.
    if any(set(map(type, ids[start : start + 32_768])) - {int} for start in range(0, len(ids), 32_768)):
        index = next(index for index, id in enumerate(ids) if type(id) is not int)
        raise RequestError(f"{where}.{index} is {shown(ids[index])}; token ids are whole numbers", where.split(".")[0])
    return ids


def check_stop(given: Any) -> Any:
    stop = [given] if isinstance(given, str) else given
    typed(stop, list, "stop", f"a text, or a list of up to {MAX_STOPS} texts")
    if len(stop) > MAX_STOPS:
        raise RequestError(f"stop holds {len(stop)} strings; at most {MAX_STOPS}", "stop")
    for one in stop:
        if not isinstance(one, str) or not 1 <= len(one) <= MAX_STOP_CHARACTERS:
            allowed = f"texts of 1 to {MAX_STOP_CHARACTERS} characters"
            raise RequestError(f"stop holds {shown(one)}; allowed: {allowed}", "stop")
    return stop


_PART = object_schema("type text", PART, type={"const": "text"}, text=TEXT)
_CONTENT = {"anyOf": [TEXT, {"type": "array", "items": _PART}]}
_CALL = object_schema("function", function=object_schema("arguments", arguments=TEXT))
_CALLS = {"type": "array", "items": _CALL, "description": "Read as their arguments, a JSON text."}
_OF_MODEL = object_schema("role", MESSAGE, role={"const": "assistant"}, content=_CONTENT, tool_calls=_CALLS)
_OF_TOOL = object_schema("role content", MESSAGE, role={"const": "tool"}, content=_CONTENT, tool_call_id=TEXT)
_OF_OTHERS = object_schema("role content", MESSAGE, role={"enum": list(ROLES)}, content=_CONTENT)
MESSAGES = {"type": "array", "maxItems": MAX_MESSAGES, "items": {"anyOf": [_OF_OTHERS, _OF_MODEL, _OF_TOOL]}}


def check_messages(given: Any) -> list[tuple[str, str]]:
    """(role, text) of each message."""
    typed(given, list, "messages", "a list of messages")
    if len(given) > MAX_MESSAGES:
        raise RequestError(f"messages holds {len(given)} messages; at most {MAX_MESSAGES}", "messages")
    return [_check_message(message, f"messages.{index}") for index, message in enumerate(given)]


def _check_message(message: Any, where: str) -> tuple[str, str]:
    typed(message, dict, where, "an object with role and content")
    role = message.get("role")
    if role not in (*ROLES, "tool"):
        raise RequestError(f"{where}.role is {shown(role)}; allowed: {', '.join(ROLES)}, tool", f"{where}.role")
    own = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
    kept = without_neutral(message, MESSAGE, ("role", "content", *own), f"{where}.")
    content, calls = kept.get("content"), kept.get("tool_calls", [])
    if role == "tool":
        if not isinstance(kept.get("tool_call_id", ""), str):
            raise RequestError(f"{where}.tool_call_id is {shown(kept['tool_call_id'])}; allowed: a text", where)
        # The template has no tools, so what one gave is read as the user's.
        role = "user"
    if role == "assistant" and (calls != [] or content is None):
        # What the model wrote is the arguments. An answer that refused has no text.
        return role, "".join([content if isinstance(content, str) else "", *_check_calls(calls, f"{where}.tool_calls")])
    where += ".content"
    if isinstance(content, str):
        return role, content
    parts = typed(content, list, where, "a text, or a list of parts of type text")
    return role, "".join([_check_part(part, f"{where}.{index}") for index, part in enumerate(parts)])


def _check_calls(calls: Any, where: str) -> list[str]:
    """The arguments of each call."""
    texts = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        text = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(text, str):
            message = f"{where} is {shown(calls)}; allowed: a list of calls, each with function.arguments as a text"
            raise RequestError(message, where)
        texts.append(text)
    return texts


def _check_part(part: Any, where: str) -> str:
    typed(part, dict, where, "an object with type and text")
    if part.get("type") != "text":
        message = f"{where}.type is {shown(part.get('type'))}; allowed: text, all that this model reads"
        raise RequestError(message, f"{where}.type")
    text = without_neutral(part, PART, ("type", "text"), f"{where}.").get("text")
    return str(typed(text, str, f"{where}.text", "a text"))
