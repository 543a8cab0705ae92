"""The HTTP side of an engine: OpenAI's routes, health, metrics and a web page.

    app = make_app(engine, Settings(name="demo"))      # an ASGI application; the engine must be started
    uvicorn.run(app, host="127.0.0.1", port=8000)

Routes are fixed and nothing a client sends becomes a path: the web page is read once, when the app is made. All that a
request holds is bounded: its body here, its tokens and its wait by the engine.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tnllm import __version__, assets
from tnllm.errors import RunError, UserError
from tnllm.generation.samples import Piece, Result
from tnllm.serving.api import (
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    TextAnswer,
    check_choices,
    error_body,
)
from tnllm.serving.engine import Busy, Engine, Event, Failed, PromptRead, Ticket
from tnllm.serving.guard import JSON, Guard, Settings

LOG = logging.getLogger("tnllm.serve")


class _Call:
    """The tickets of one HTTP request and the events of all, numbered by choice, on the event loop's thread."""

    def __init__(self, engine: Engine, asked: CompletionRequest | ChatRequest, client: str) -> None:
        self._engine, self._asked, self._client = engine, asked, client
        self._queue: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        chat = isinstance(asked, ChatRequest)
        self._answer: Callable[..., Any] = ChatAnswer if chat else TextAnswer

    def prepare(self, name: str) -> None:
        """Tokenize and check, then queue every prompt or none. Takes time for long prompts: call it on a thread."""
        ready, asked = self._engine.ready, self._asked
        prompts, params = asked.prompts(ready), asked.params(ready)
        check_choices(len(prompts), params.n)
        for prompt in prompts:
            self._engine.check(prompt, params)
        fingerprint = f"fp_{self._engine.weights[:12]}"
        self.answer = self._answer(ready, name, fingerprint, asked, prompts, params)
        echoes = isinstance(asked, CompletionRequest) and asked.echo and params.logprobs is not None
        self._samples = params.n
        self._left = len(prompts) * params.n
        try:
            for place, prompt in enumerate(prompts):
                deliver = partial(self._deliver, place * params.n)
                ticket = self._engine.submit(
                    prompt, params, client=self._client, prompt_logprobs=echoes, deliver=deliver
                )
                self._tickets.append(ticket)
        except UserError:
            self.cancel()
            raise

    def _deliver(self, first: int, events: list[Event]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (first, events))
        except RuntimeError:
            # The loop is closed, and with it the connection: nobody wants the rest.
            self.cancel()

    def cancel(self) -> None:
        """Free what the request holds, if it has not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, PromptRead | Piece | Result]]:
        """(choice, event) until every choice has ended. Raises UserError for what went wrong."""
        while self._left:
            first, events = await self._queue.get()
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, PromptRead):
                    self.answer.cached_tokens += event.cached_tokens
                    for sample in range(self._samples):
                        yield first + sample, event
                    continue
                if isinstance(event, Piece):
                    self.answer.completion_tokens += 1
                else:
                    self._left -= 1
                yield first + event.sample, event

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices: dict[int, dict[str, Any]] = {}
        read: dict[int, PromptRead] = {}
        async for choice, event in self.events():
            if isinstance(event, PromptRead):
                read[choice] = event
            elif isinstance(event, Result):
                choices[choice] = self.answer.whole(choice, event, read[choice].logprobs)
        return self.answer.body([choices[choice] for choice in sorted(choices)])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        options = self._asked.stream_options
        usage = options is not None and options.include_usage
        try:
            async for choice, event in self.events():
                if isinstance(event, PromptRead):
                    parts = self.answer.first(choice, event.logprobs)
                elif isinstance(event, Piece):
                    parts = self.answer.piece(choice, event)
                else:
                    parts = self.answer.last(choice, event)
                for part in parts:
                    yield _event(self.answer.chunk([part]) | ({"usage": None} if usage else {}))
            if usage:
                yield _event(self.answer.chunk([]) | {"usage": self.answer.usage()})
            yield b"data: [DONE]\n\n"
        except UserError as error:
            yield _event(_error(error)[1])


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _EventStream(Response):
    """Sends chunks as they come; a client that goes away ends it at once."""

    def __init__(self, call: _Call) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_when_gone(receive, self._call))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._call.chunks():
                if watcher.done():
                    return
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self._call.cancel()


async def _when_gone(receive: Receive, call: _Call) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancel()


def _error(error: UserError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    if isinstance(error, Busy):
        headers = {"Retry-After": str(error.retry_after_s)}
        if error.stopping:
            return 503, error_body(str(error), "service_unavailable", "shutting_down"), headers
        return 429, error_body(str(error), "rate_limit_error", "queue_full"), headers
    if isinstance(error, RunError):
        return 500, error_body(str(error), "server_error"), {}
    return 400, error_body(str(error), "invalid_request_error"), {}


def make_app(engine: Engine, settings: Settings) -> ASGIApp:
    """The application. The engine is started and stopped by whoever made it."""
    app = FastAPI(
        title="tnllm", version=__version__, docs_url=None, redoc_url=None, default_response_class=JSON,
        description="TransNormerLLM behind OpenAI's API.",
    )  # fmt: skip

    @app.exception_handler(UserError)
    async def _user_error(request: Request, error: UserError) -> JSON:
        status, body, headers = _error(error)
        return JSON(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSON:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return JSON(error_body(message, "invalid_request_error", param=where or None), 400)

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

    async def _answer(request: Request, asked: CompletionRequest | ChatRequest) -> Response:
        if asked.model not in (None, settings.name):
            message = f"model is {asked.model!r}; this server has {settings.name!r}"
            return JSON(error_body(message, "invalid_request_error", "model_not_found", "model"), 404)
        call = _Call(engine, asked, request.client.host if request.client else "")
        await run_in_threadpool(call.prepare, settings.name)
        if asked.stream:
            return _EventStream(call)
        watcher = asyncio.create_task(_when_gone(request.receive, call))
        try:
            return JSON(await call.whole())
        finally:
            watcher.cancel()
            call.cancel()

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue one or several texts."""
        return await _answer(request, asked)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer the last message of a conversation."""
        return await _answer(request, asked)

    created = engine.metrics.started

    def model() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": int(created), "owned_by": "tnllm"}

    @app.get("/v1/models")
    async def models() -> JSON:
        """The one model that is served."""
        return JSON({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name}")
    async def model_named(name: str) -> JSON:
        """The model, if that is its name."""
        if name != settings.name:
            message = f"there is no model {name!r}; this server has {settings.name!r}"
            return JSON(error_body(message, "invalid_request_error", "model_not_found", "model"), 404)
        return JSON(model())

    @app.get("/health")
    async def health() -> JSON:
        """200 while requests are taken, 503 while the server shuts down."""
        if engine.stopping:
            return JSON({"status": "shutting down"}, 503)
        return JSON({"status": "ok", "version": __version__})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = (assets.folder() / "web" / "index.html").read_text(encoding="utf-8")
    policy = _content_policy(page)

    @app.get("/", include_in_schema=False)
    async def web_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    return Guard(app, settings)


def _content_policy(page: str) -> str:
    """A policy that runs the page's own script and style, by their hashes, and talks to this server alone."""

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
