"""Routes about text and the server itself: /tokenize, /detokenize, /apply-template, /props.

add_text_routes(app, models, settings, generator)

Bodies are llama.cpp's and vLLM's, which share these paths; an answer holds the keys of both.
"""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, PlainValidator
from starlette.concurrency import run_in_threadpool

from tnllm import __version__, assets
from tnllm.chat_template import render_part
from tnllm.errors import UserError
from tnllm.serving import bodies
from tnllm.serving.answers import SETTINGS
from tnllm.serving.api import MESSAGES, check_text_length, turns, validated
from tnllm.serving.bodies import Body, RequestError
from tnllm.serving.generating import Generator
from tnllm.serving.middleware import JSON, Settings
from tnllm.serving.openapi import described
from tnllm.serving.schemas import Detokenized, Props, Template, Tokenized
from tnllm.serving.served import Models, Served

# Hints of others that change nothing here.
_HINTS = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "chat_template_content_format")
_NEUTRAL = {name: bodies.REQUEST[name] for name in _HINTS}


class _Text(Body):
    neutral = _NEUTRAL

    model: str | None = Field(None, description="A served model's id, or nothing.")


class TokenizeRequest(_Text):
    """POST /tokenize: content, prompt or messages."""

    content: str | None = Field(None, description="a text; no begin token unless add_special is true")
    prompt: str | None = Field(None, description="a text, as the start of one: as completions read it")
    messages: MESSAGES | None = Field(None, description="a list of messages, as a conversation is read")
    add_special: bool | None = Field(None, description="Whether a begin token comes first, if the model has one.")
    add_special_tokens: bool | None = Field(None, description="Another name for add_special.")
    parse_special: bool = Field(True, description="Has no effect: text is never a control token here.")
    with_pieces: bool = Field(False, description="Give each token's text, or its bytes where they are not text.")
    return_token_strs: bool = Field(False, description="Give the vocabulary's spelling of each token.")

    def ids(self, served: Served) -> list[int]:
        """Token ids. Raises RequestError."""
        loaded, most = served.engine.loaded, served.engine.max_prompt_tokens
        given = {"content": self.content, "prompt": self.prompt, "messages": self.messages}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            message = f"give one of content, prompt and messages; given: {', '.join(names) or 'none'}"
            raise RequestError(message, "content")
        start = self.add_special if self.add_special is not None else self.add_special_tokens
        if self.messages is not None:
            ids, _ = turns(loaded, self.messages, most, awaits_answer=False, is_last=True)
            return loaded.at_start(ids) if start is not False else ids
        text = self.content if self.content is not None else self.prompt or ""
        check_text_length(loaded, text, most, names[0])
        if start is None:
            start = self.prompt is not None
        return loaded.encode(text, start=start and loaded.add_bos)


class DetokenizeRequest(_Text):
    """POST /detokenize."""

    tokens: Annotated[
        list[int], PlainValidator(bodies.check_tokens, json_schema_input_type=list[int])
    ] = Field(description="token ids")  # fmt: skip


class TemplateRequest(_Text):
    """POST /apply-template."""

    messages: MESSAGES = Field(description="a list of messages")


def _tokenized(body: TokenizeRequest, served: Served) -> dict[str, Any]:
    tokenizer = served.engine.loaded.tokenizer
    ids = body.ids(served)
    tokens: list[Any] = ids
    if body.with_pieces:
        tokens = [{"id": id, "piece": _piece(tokenizer.token_bytes[id])} for id in ids]
    answer = {"tokens": tokens, "count": len(ids), "max_model_len": served.engine.max_prompt_tokens}
    return answer | ({"token_strs": [tokenizer.piece(id) for id in ids]} if body.return_token_strs else {})


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _detokenized(body: DetokenizeRequest, served: Served) -> dict[str, Any]:
    try:
        text = served.engine.loaded.tokenizer.decode(body.tokens)
    except UserError as error:
        raise RequestError(str(error), "tokens") from None
    return {"content": text, "prompt": text}


def _template(body: TemplateRequest, served: Served) -> dict[str, Any]:
    loaded = served.engine.loaded
    if not body.messages:
        raise RequestError("messages is empty; give at least one message, such as a user's", "messages")
    segments, _ = render_part(loaded.chat_template, body.messages)
    end = loaded.tokenizer.piece(loaded.tokenizer.eos_id)
    return {"prompt": "".join([segment.text + (end if segment.eos else "") for segment in segments])}


def _props(served: Served, settings: Settings) -> dict[str, Any]:
    engine, loaded = served.engine, served.engine.loaded
    config, tokenizer, defaults = loaded.model.config, loaded.tokenizer, loaded.params()
    most = min(defaults.max_tokens, engine.max_new_tokens)
    params = {name: getattr(defaults, name) for name in SETTINGS} | {"max_tokens": most, "n_predict": most}
    return {
        "model_alias": served.name,
        "is_demo": loaded.folder == assets.demo_weights(),
        "is_chat_tuned": loaded.is_chat_tuned,
        "build_info": f"tnllm {__version__}",
        "total_slots": engine.num_slots,
        "chat_template": loaded.chat_template,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "default_generation_settings": {"n_ctx": engine.max_prompt_tokens, "params": params},
        "limits": {
            "prompt_tokens": engine.max_prompt_tokens,
            "new_tokens": engine.max_new_tokens,
            "queue": engine.queue_size,
            "body_bytes": settings.max_body_bytes,
        },
        "features": {
            "schema": served.grammars.available,
            "tools": ["none", "required", "named"],
            "api_key": bool(settings.keys),
            "state_grows": loaded.model.init_state(1).grows,
        },
        "vocab_size": config.vocab_size,
        "modalities": {"vision": False, "audio": False},
    }


def add_text_routes(app: FastAPI, models: Models, settings: Settings, generator: Generator) -> None:
    def add(path: str, schema: Any, kind: Any, answer: Callable[[Any, Served], dict[str, Any]], summary: str) -> None:
        def work(content: bytes) -> dict[str, Any]:
            body = validated(kind, content, max(served.engine.max_prompt_tokens for served in models))
            return answer(body, models.named(body.model))

        async def answered(request: Request) -> Response:
            content, _ = await generator.body(request)
            return JSON(await run_in_threadpool(work, content))

        name = path.strip("/").replace("-", "_")
        app.post(path, name=name, description=summary, **described(schema, kind))(answered)

    add("/tokenize", Tokenized, TokenizeRequest, _tokenized, "Token ids of a text or a conversation.")
    add("/detokenize", Detokenized, DetokenizeRequest, _detokenized, "The text of token ids.")
    add("/apply-template", Template, TemplateRequest, _template, "A conversation as the model reads it, as one text.")

    @app.get("/props", **described(Props))
    async def get_props() -> JSON:
        """Limits, defaults and what is on, of the first model."""
        return JSON(_props(models.first, settings))
