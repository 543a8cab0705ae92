"""What /openapi.json says: the bodies of requests with this server's own limits, the answers, the errors.

@app.post("/v1/completions", **described(Completion, CompletionRequest))
async def completions(request: Request) -> Response: ...

add_openapi(app, engine, ["demo"])
"""

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tnllm.serving import bodies
from tnllm.serving.api import GenerateRequest
from tnllm.serving.engine import Engine
from tnllm.serving.schemas import Error

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "A key or value that is not allowed.",
    401: "A wrong or missing API key.",
    403: "A Host that is not served.",
    404: "No such model or state.",
    410: "The state's file is damaged.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests wait.",
    500: "A fault of the server.",
    503: "The server is shutting down, or has too many connections.",
    507: "The state could not be written.",
}
# Of an answer with the keys of the other kind, an error, or the text [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON, or [DONE]."}}}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


# Those of all routes that were described.
_REQUESTS: set[type[BaseModel]] = set()


def described(
    answer: type[BaseModel] | None, request: type[BaseModel] | None = None, media_type: str = "text/plain"
) -> dict[str, Any]:
    """Arguments of a FastAPI route whose body is `request` and whose answer is `answer`; None: not JSON.

    A route with a body may also answer with a stream.
    """
    errors = _ERRORS if request is not None else {code: _ERRORS[code] for code in (401, 403, 500, 503)}
    responses: dict[int | str, dict[str, Any]] = {
        code: {"model": Error, "description": text, **({"headers": _RETRY} if code in (429, 503) else {})}
        for code, text in errors.items()
    }
    responses["default"] = {"model": Error, "description": "Any other error."}
    more: dict[str, Any] = {"responses": responses}
    if answer is not None:
        responses[200] = {"model": answer, "description": "The answer."}
    else:
        responses[200] = {"description": "Text, or a file.", "content": {media_type: {"schema": {"type": "string"}}}}
    if request is not None:
        if issubclass(request, GenerateRequest):
            responses[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
        reference = {"$ref": _REFERENCE.format(model=request.__name__)}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        more["openapi_extra"] = {"requestBody": body}
        _REQUESTS.add(request)
    return more


def add_openapi(app: FastAPI, engine: Engine, names: list[str]) -> None:
    """Make /openapi.json say what this engine takes; `names` are the models'."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(body, "validation") for body in _REQUESTS], ref_template=_REFERENCE)
    for operations in document["paths"].values():
        for operation in operations.values():
            schema = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in schema:
                # FastAPI takes an answer that a route has written itself for a text.
                schema.pop("type", None)
    schemas = copy.deepcopy(definitions["$defs"])
    for request in _REQUESTS:
        _open(schemas[request.__name__], bodies.REQUEST if issubclass(request, GenerateRequest) else {})
        _limit(schemas[request.__name__]["properties"], engine, names)
    document["components"]["schemas"] |= schemas
    app.openapi = lambda: document  # type: ignore[method-assign]


def _open(schema: dict[str, Any], neutral: dict[str, bodies.Neutral]) -> None:
    """Allow what `without_neutral` drops: null for an optional key, neutral values, unknown keys that are off."""
    for key, value in schema["properties"].items():
        if key not in schema.get("required", ()):
            options = value.pop("anyOf", None) or [{k: value.pop(k) for k in list(value) if k not in _NOTES}]
            value["anyOf"] = [*(option for option in options if option != {"type": "null"}), {"type": "null"}]
    schema["properties"] = {key: dict(value.schema) for key, value in neutral.items()} | schema["properties"]
    schema["additionalProperties"] = dict(bodies.OFF.schema)


_NOTES = ("title", "description", "default")


def _limit(properties: dict[str, Any], engine: Engine, names: list[str]) -> None:
    """The server's own limits."""
    if "model" in properties:
        properties["model"]["anyOf"][0] = {"type": "string", "enum": names}
    for key in ("max_tokens", "max_completion_tokens", "n_predict"):
        if "anyOf" in properties.get(key, {}):
            properties[key]["anyOf"][0]["maximum"] = engine.max_new_tokens
    for key in ("logprobs", "n_probs"):
        if "echo" in properties and "anyOf" in properties.get(key, {}):
            # What the chat's key of this name says for none.
            properties[key]["anyOf"].append({"const": False})
    for option in properties.get("prompt", {}).get("anyOf", ()):
        ids = option.get("items", {}) if option.get("items", {}).get("type") == "array" else option
        if ids.get("items", {}).get("type") == "integer":
            ids["items"] |= {"minimum": 0, "maximum": engine.loaded.tokenizer.vocab_size - 1}
            ids["maxItems"] = engine.max_prompt_tokens
