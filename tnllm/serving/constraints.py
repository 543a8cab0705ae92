"""What a request says its text must fit: `response_format`, `structured_outputs`, and the tool that it must call.

    wanted = check_response_format({"type": "json_schema", "json_schema": {"schema": {...}}}) # ("json", {...})
    call = tool_call(check_tools(tools), check_tool_choice("required"))    # Call("name", schema), or None
    grammar = compiled(grammars, wanted, "response_format")                # raises RequestError

Types are checked when the body is read; a schema or expression that cannot be compiled is found here too, before anything
is queued.
"""

import re
from dataclasses import dataclass
from typing import Any

from tnllm.errors import MissingExtra, UserError
from tnllm.generation.grammar import Grammar, Grammars
from tnllm.serving.bodies import TEXT, RequestError, object_schema, shown, typed, without_neutral

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# A kind of grammar and its source: ("json", schema), ("regex", pattern) or ("gbnf", grammar).
Wanted = tuple[str, Any]


# What they may be, for /openapi.json. An object beside another type than its own has no effect.
RESPONSE_FORMAT = object_schema(
    "type", type={"enum": ["text", "json_object", "json_schema", "regex"]}, json_schema={"type": "object"}, pattern=TEXT,
    schema={"type": "object", "description": "With type json_object."},
)  # fmt: skip
STRUCTURED_OUTPUTS = object_schema(
    json={"type": "object"}, regex=TEXT, choice={"type": "array", "items": TEXT, "minItems": 1}, grammar=TEXT
)
_NAMED = {"type": "string", "pattern": f"^{_NAME.pattern}$"}
_FUNCTION = object_schema("name", name=_NAMED, description=TEXT, parameters={"type": "object"})
_TOOL = object_schema("type function", type={"const": "function"}, function=_FUNCTION)
TOOLS = {"type": "array", "maxItems": MAX_TOOLS, "items": _TOOL}
_CHOICE = object_schema("type function", type={"const": "function"}, function=object_schema("name", name=TEXT))
TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, _CHOICE]}


@dataclass(frozen=True)
class Call:
    """The call that an answer must be. Without a name the model chooses, and writes the name, too."""

    name: str | None
    schema: Any


def check_response_format(given: Any) -> Wanted | None:
    """None for plain text. Raises RequestError."""
    rule = "an object whose type is text, json_object, json_schema or regex"
    values = typed(given, dict, "response_format", rule)
    kind = values.get("type")
    own = {"json_schema": "json_schema", "regex": "pattern", "json_object": "schema"}.get(str(kind))
    for key, fitting in (("pattern", str), ("json_schema", dict), ("schema", dict)):
        if key != own and values.get(key) is not None and not isinstance(values[key], fitting):
            message = f"response_format.{key} is {shown(values[key])}; it needs another type"
            raise RequestError(message, "response_format")
    kept = without_neutral(values, {}, ["type", *([own] if own else [])], "response_format.")
    if kind == "text":
        return None
    if kind == "json_object":
        return "json", _schema(kept.get("schema", {"type": "object"}), "response_format.schema")
    if kind == "regex":
        return "regex", typed(kept.get("pattern"), str, "response_format.pattern", "a text")
    if kind != "json_schema":
        raise RequestError(f"response_format.type is {shown(kind)}; allowed: {rule}", "response_format")
    where = "response_format.json_schema"
    named = typed(kept.get("json_schema"), dict, where, "an object with a schema")
    return "json", _schema(named.get("schema"), f"{where}.schema")


def _schema(given: Any, where: str) -> Any:
    return typed(given, (dict, bool), where, "a JSON schema, which is an object")


def check_structured_outputs(given: Any) -> Wanted:
    """Raises RequestError."""
    where, names = "structured_outputs", ("json", "regex", "choice", "grammar")
    values = without_neutral(
        typed(given, dict, where, f"an object with one of {', '.join(names)}"), {}, names, f"{where}."
    )
    if len(values) != 1:
        raise RequestError(f"{where} has {shown(sorted(values))}; give one of {', '.join(names)}", where)
    [(name, value)] = values.items()
    where += f".{name}"
    if name == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise RequestError(f"{where} is {shown(value)}; allowed: a list of texts", where)
        # Escaped as Rust's syntax asks.
        return "regex", "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", one) for one in value)
    if name == "json":
        return "json", _schema(value, where)
    return "gbnf" if name == "grammar" else name, typed(value, str, where, "a text")


def check_tools(given: Any) -> list[tuple[str, Any]]:
    """(name, schema of the arguments) of each tool. Raises RequestError."""
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise RequestError(f"tools is {shown(given)}; allowed: a list of up to {MAX_TOOLS} tools", "tools")
    tools: list[tuple[str, Any]] = []
    for index, tool in enumerate(given):
        where = f"tools.{index}"
        function = typed(tool, dict, where, "an object with type and function").get("function")
        if tool.get("type") != "function":
            raise RequestError(f"{where}.type is {shown(tool.get('type'))}; allowed: function", f"{where}.type")
        function = typed(function, dict, f"{where}.function", "an object with name and parameters")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            message = f"{where}.function.name is {shown(name)}; allowed: 1 to 64 letters, digits, _ and -"
            raise RequestError(message, f"{where}.function.name")
        if parameters is None:
            parameters = {"type": "object", "additionalProperties": False}
        tools.append((name, _schema(parameters, f"{where}.function.parameters")))
    return tools


def check_tool_choice(given: Any) -> str | tuple[str, str]:
    """none, auto, required, or ("function", its name). Raises RequestError."""
    if given in ("none", "auto", "required"):
        return str(given)
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        rule = 'none, required, or {"type": "function", "function": {"name": ...}}'
        raise RequestError(f"tool_choice is {shown(given)}; allowed: {rule}", "tool_choice")
    return "function", name


def tool_call(tools: list[tuple[str, Any]] | None, choice: str | tuple[str, str] | None) -> Call | None:
    """The call that the answer must be. Raises RequestError for one that the model would have to decide by itself."""
    if not tools or choice == "none":
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice is {shown(choice)}; it needs tools", "tool_choice")
        return None
    if choice in (None, "auto"):
        message = (
            "tool_choice is 'auto'; this model's chat template has no tools, so it cannot decide to call one: give "
            "'none', 'required', or the function that it must call"
        )
        raise RequestError(message, "tool_choice", "tools_not_in_template")
    if isinstance(choice, tuple):
        named = [Call(name, schema) for name, schema in tools if name == choice[1]]
        if not named:
            names = ", ".join(name for name, _ in tools)
            raise RequestError(f"tool_choice is {shown(choice[1])}; tools has {names}", "tool_choice")
        return named[0]
    if len(tools) == 1:
        return Call(*tools[0])
    options = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": _moved(schema, f"#/anyOf/{index}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, (name, schema) in enumerate(tools)
    ]
    return Call(None, {"anyOf": options})


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another one: its references lead there."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def compiled(grammars: Grammars, wanted: Wanted, param: str) -> Grammar:
    """Raises RequestError for one that the library does not take, with its reason."""
    kind, source = wanted
    compile = {"json": grammars.json_schema, "regex": grammars.regex, "gbnf": grammars.gbnf}[kind]
    try:
        return compile(source)
    except MissingExtra as error:
        raise RequestError(f"{param}: {error}", param, "schema_not_installed") from None
    except UserError as error:
        raise RequestError(f"{param} cannot be used: {error}", param, "invalid_schema") from None
