"""The HTTP side of an engine: OpenAI's routes, health, metrics and a web page.

    app = make_app(engine, Settings(name="demo"))      # an ASGI application; the engine must be started
    uvicorn.run(app, host="127.0.0.1", port=8000)

Routes are fixed and nothing that a client sends becomes a path: the page's files are read once, when the app is made. The
middleware limits a request's body, the engine its tokens and the length of the queue.
"""

import asyncio
import json
import logging
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tnllm import __version__
from tnllm.errors import RunError, UserError
from tnllm.generation.samples import Piece, Result
from tnllm.serving.api import (
    Answer,
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    TextAnswer,
    check_size,
    error_body,
    validated,
)
from tnllm.serving.bodies import RequestError, shown
from tnllm.serving.engine import Busy, Engine, Event, Failed, PromptRead, TooLong
from tnllm.serving.middleware import JSON, OWNER, RequestChecks, Settings, encode_json, read_json_body
from tnllm.serving.openapi import add_openapi, described
from tnllm.serving.schemas import ChatCompletion, Completion, Health, Model, ModelList
from tnllm.serving.state_routes import add_state_routes
from tnllm.serving.states import StateStore
from tnllm.serving.web_page import add_web_page

LOG = logging.getLogger("tnllm.serve")
# Bytes; a smaller body is parsed within milliseconds.
_LARGE_BODY = 1 << 16


class _Submission:
    """One HTTP request in the engine, and its events numbered by choice on the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        kind: type[CompletionRequest] | type[ChatRequest],
        content: bytes,
        client: str,
        name: str,
        loop: AbstractEventLoop,
        states: StateStore,
        owner: str,
    ) -> None:
        """Parse, tokenize and check, then queue every prompt or none. Raises UserError.

        Long prompts take time, so this runs on a thread of its own; `loop` is the server's.
        """
        body = validated(kind, content, engine.max_prompt_tokens)
        if body.model not in (None, name):
            message = f"model is {shown(body.model)}; this server has {name!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        self._loop, self.body = loop, body
        self._queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        loaded = engine.loaded
        params = body.params(loaded, engine.max_new_tokens)
        stored = None if body.state is None else states.get(owner, body.state)
        start = None if stored is None else states.context(stored)
        prompts = body.prompts(loaded, engine.max_prompt_tokens, stored is not None and stored.awaits_answer)
        check_size(body, prompts, params)
        fingerprint = f"fp_{engine.weights[:12]}"
        answer = ChatAnswer if isinstance(body, ChatRequest) else TextAnswer
        self.answer: Answer = answer(loaded, name, fingerprint, body, prompts, params)
        echoes = isinstance(body, CompletionRequest) and body.echo and params.logprobs is not None
        self.answer.prompt_tokens += 0 if stored is None else stored.num_tokens * len(prompts)
        self._samples, self._has_logprobs = params.n, params.logprobs is not None
        try:
            ticket = engine.submit_all(
                prompts, params, client=client, prompt_logprobs=echoes, start=start, deliver=self._deliver
            )
        except Busy:
            raise
        except UserError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise RequestError(str(error), body.text_key, code) from None
        # Releases the slots of what has not ended.
        self.cancel = ticket.cancel

    def _deliver(self, events: list[Event]) -> None:
        # A closed loop has no connections.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)

    async def cancel_on_disconnect(self, receive: Receive) -> None:
        """Wait until the client has disconnected, then cancel."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    async def events(self) -> AsyncIterator[tuple[int, PromptRead | Piece | Result]]:
        """(choice, event) until every choice has ended. Raises UserError if one fails."""
        unfinished = self.answer.num_choices
        while unfinished:
            for event in await self._queue.get():
                if isinstance(event, Failed):
                    raise event.error
                first_choice = event.index * self._samples
                if isinstance(event, PromptRead):
                    self.answer.cached_tokens += event.cached_tokens
                    for sample in range(self._samples):
                        yield first_choice + sample, event
                    continue
                if isinstance(event, Piece):
                    self.answer.completion_tokens += 1
                else:
                    unfinished -= 1
                yield first_choice + event.sample, event

    async def full_body(self) -> bytes:
        """The answer as one JSON object."""
        results: dict[int, Result] = {}
        prompts: dict[int, PromptRead] = {}
        async for choice, event in self.events():
            if isinstance(event, PromptRead):
                prompts[choice] = event
            elif isinstance(event, Result):
                results[choice] = event

        def encoded() -> bytes:
            choices = [
                self.answer.full_choice(choice, results[choice], prompts[choice].logprobs) for choice in sorted(results)
            ]
            # With log-probabilities it may be long.
            return encode_json(self.answer.body(choices), yielding=self._has_logprobs)

        # A long prompt or text that is sent with its log-probabilities takes seconds.
        return await run_in_threadpool(encoded)

    async def server_sent_events(self) -> AsyncIterator[bytes]:
        """The answer as a stream."""
        options = self.body.stream_options
        usage = options is not None and options.include_usage
        try:
            async for choice, event in self.events():
                if isinstance(event, PromptRead):
                    parts = await run_in_threadpool(self.answer.first, choice, event.logprobs)
                elif isinstance(event, Piece):
                    parts = self.answer.piece(choice, event)
                else:
                    parts = self.answer.last(choice, event)
                for part in parts:
                    yield _server_sent_event(self.answer.chunk([part]) | ({"usage": None} if usage else {}))
            if usage:
                yield _server_sent_event(self.answer.chunk([]) | {"usage": self.answer.usage()})
            yield b"data: [DONE]\n\n"
        except UserError as error:
            yield _server_sent_event(_error(error)[1])


def _server_sent_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _EventStream(StreamingResponse):
    """Ends when the client disconnects, and releases the slots even if that was before the first event."""

    def __init__(self, submission: _Submission) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(submission.server_sent_events(), headers=headers, media_type="text/event-stream")
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.cancel()


def _error(error: UserError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    if isinstance(error, Busy):
        headers = {"Retry-After": str(error.retry_after_s)}
        busy = ("service_unavailable", "shutting_down") if error.stopping else ("rate_limit_error", "queue_full")
        return 503 if error.stopping else 429, error_body(str(error), *busy), headers
    if isinstance(error, RunError):
        return 500, error_body(str(error), "server_error"), {}
    if isinstance(error, RequestError):
        return error.status, error_body(str(error), "invalid_request_error", error.code, error.param), error.headers
    return 400, error_body(str(error), "invalid_request_error"), {}


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(UserError)
    async def _user_error(request: Request, error: UserError) -> JSON:
        status, body, headers = _error(error)
        return JSON(body, status, headers)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSON:
        messages = {
            404: "there is no such route; see /openapi.json",
            405: f"{request.method} is not allowed here; see /openapi.json",
        }
        message = messages.get(error.status_code, str(error.detail))
        return JSON(error_body(message, "invalid_request_error"), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSON:
        return JSON(error_body("the server has a bug; its log says more", "server_error"), 500)


def make_app(engine: Engine, settings: Settings, states: StateStore | None = None) -> FastAPI:
    """The application. The caller starts and stops the engine. Without `states`, they are kept in memory."""
    store = states or StateStore(engine.loaded, engine.weights, engine.metrics)
    app = FastAPI(
        title="tnllm", version=__version__, docs_url=None, redoc_url=None, default_response_class=JSON,
        redirect_slashes=False, description="TransNormerLLM behind OpenAI's API.",
    )  # fmt: skip

    _add_error_handlers(app)

    # One large body at a time: parsing holds the interpreter, and memory of many times its size.
    one_large_body = CapacityLimiter(1)

    async def respond(request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        content = await read_json_body(request, settings.max_body_bytes)
        client = request.client.host if request.client else ""
        submit = partial(_Submission, engine, kind, content, client, settings.name, asyncio.get_running_loop(),
                         store, request.scope[OWNER])  # fmt: skip
        submission = await to_thread.run_sync(submit, limiter=one_large_body if len(content) > _LARGE_BODY else None)
        if submission.body.stream:
            return _EventStream(submission)
        watcher = asyncio.create_task(submission.cancel_on_disconnect(request.receive))
        try:
            return Response(await submission.full_body(), media_type=JSON.media_type)
        finally:
            watcher.cancel()
            submission.cancel()

    @app.post("/v1/completions", **described(Completion, CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or several texts."""
        return await respond(request, CompletionRequest)

    @app.post("/v1/chat/completions", **described(ChatCompletion, ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await respond(request, ChatRequest)

    created = engine.metrics.started

    def model() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": int(created), "owned_by": "tnllm"}

    @app.get("/v1/models", **described(ModelList))
    async def models() -> JSON:
        """The one model that is served."""
        return JSON({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", **described(Model))
    async def model_named(name: str) -> JSON:
        """The model, if that is its name."""
        if name != settings.name:
            message = f"there is no model {shown(name)}; this server has {settings.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        return JSON(model())

    @app.get("/health", **described(Health))
    async def health() -> JSON:
        """200 while requests are taken, 503 while the server shuts down."""
        if engine.stopping:
            return JSON({"status": "shutting down"}, 503)
        return JSON({"status": "ok", "version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse, **described(None))
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_web_page(app, engine, settings)
    add_state_routes(app, engine, settings, store)
    add_openapi(app, engine, settings.name)
    for route in app.routes:
        if isinstance(route, Route) and "GET" in (route.methods or ()):
            # The server leaves the body out. Starlette's own routes do this, FastAPI's do not.
            route.methods = {"GET", "HEAD"}
    app.add_middleware(RequestChecks, settings=settings)
    return app
