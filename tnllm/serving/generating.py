"""A request that generates, from its body to its answer: parsed, queued, and sent complete or as a stream.

generator = Generator(models, settings, store)
return await generator.respond(request, CompletionRequest, TextAnswer)
"""

import asyncio
import json
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from tnllm.errors import RunError, UserError
from tnllm.generation.context import Context
from tnllm.generation.grammar import GrammarError
from tnllm.generation.samples import Piece, Result
from tnllm.serving.answers import Answer
from tnllm.serving.api import ChatRequest, CompletionRequest, check_size, validated
from tnllm.serving.bodies import RequestError, error_body
from tnllm.serving.middleware import JSON, OWNER, TOKENS, Settings, encode_json, read_json_body
from tnllm.serving.served import Models
from tnllm.serving.states import StateStore
from tnllm.serving.tickets import Event, Failed, PromptRead, TooLong

# Bytes; a smaller body is parsed within milliseconds.
_LARGE_BODY = 1 << 16


@contextmanager
def refusals_of(key: str) -> Iterator[None]:
    """What an engine refuses as errors of a body's key."""
    try:
        yield
    except RequestError:
        raise
    except UserError as error:
        code = "context_length_exceeded" if isinstance(error, TooLong) else None
        raise RequestError(str(error), key, code) from None


@asynccontextmanager
async def cancelled_without_client(receive: Receive, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """Cancels when the client disconnects, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        cancel()


class Submission:
    """One HTTP request in the engine, and its events numbered by choice on the event loop's thread."""

    def __init__(
        self,
        models: Models,
        states: StateStore,
        kind: type[CompletionRequest] | type[ChatRequest],
        answer: type[Answer],
        content: bytes,
        client: str,
        owner: str,
        loop: AbstractEventLoop,
    ) -> None:
        """Parse, tokenize and check, then queue every prompt or none. Raises UserError.

        Long prompts take time, so this runs on a thread of its own; `loop` is the server's.
        """
        longest = max(served.engine.max_prompt_tokens for served in models)
        self.body = body = validated(kind, content, longest)
        self._loop = loop
        self._queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        stored = None if body.state is None else states.get(owner, body.state)
        self.served = served = models.chosen(body.model, stored)
        engine, loaded = served.engine, served.engine.loaded
        params = body.params(loaded, engine.max_new_tokens, served.grammars)
        start = None if stored is None else states.context(stored)
        prompts = body.prompts(loaded, engine.max_prompt_tokens, stored is not None and stored.awaits_answer)
        check_size(body, prompts, params)
        self.answer = answer(loaded, served.name, served.fingerprint, body, prompts, params)
        self.answer.prompt_tokens += 0 if stored is None else stored.num_tokens * len(prompts)
        self._samples, self._has_logprobs = params.n, params.logprobs is not None or body.prompt_logprobs is not None
        prompts, start = self.prepare(owner, prompts, start)
        self._unfinished = self.answer.num_choices
        with refusals_of(body.text_key):
            ticket = engine.submit_all(
                prompts, params, client=client, prompt_logprobs=body.scored_prompt(params), start=start,
                keep_context=self.keeps_context, deliver=self._deliver,
            )  # fmt: skip
        engine.metrics.requests[served.name] += 1
        engine.metrics.grammars += params.grammar is not None
        # Releases the slots of what has not ended.
        self.cancel = ticket.cancel

    keeps_context = False

    def prepare(
        self, owner: str, prompts: list[list[int]], start: Context | None
    ) -> tuple[list[list[int]], Context | None]:
        """What is to be read, and after which context."""
        return prompts, start

    def _deliver(self, events: list[Event]) -> None:
        # A closed loop has no connections.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)

    async def events(self) -> AsyncIterator[tuple[int, PromptRead | list[Piece] | Result]]:
        """(choice, event) until every choice has ended; tokens that came together are one. Raises UserError."""
        while self._unfinished:
            for _, together in groupby(await self._queue.get(), _sample_of):
                event, *more = together
                if isinstance(event, Failed):
                    raise event.error
                first_choice = event.index * self._samples
                if isinstance(event, Piece):
                    # Writing an event takes longer than its token: a GPU sends eight at a time.
                    pieces = [event, *(piece for piece in more if isinstance(piece, Piece))]
                    self.answer.count(pieces)
                    yield first_choice + event.sample, pieces
                    continue
                self.answer.count(event)
                if isinstance(event, PromptRead):
                    self.has_read(event)
                    for sample in range(self._samples):
                        yield first_choice + sample, event
                    continue
                self._unfinished -= 1
                self.served.engine.metrics.tool_calls += self.body.call() is not None and event.finish_reason == "eos"
                yield first_choice + event.sample, event

    def has_read(self, event: PromptRead) -> None:
        """A prompt was read."""

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
        usage = self.body.stream_options
        try:
            async for choice, event in self.events():
                if isinstance(event, PromptRead):
                    parts = await run_in_threadpool(self.answer.first, choice, event.logprobs)
                elif isinstance(event, list):
                    parts = self.answer.piece(choice, event)
                else:
                    parts = self.answer.last(choice, event)
                for part in parts:
                    more: dict[str, Any] = {"usage": None} if usage else {}
                    if isinstance(event, Result) and not self._unfinished:
                        more["timings"] = self.answer.timings()
                    yield _server_sent_event(self.answer.chunk([part]) | more)
            if usage:
                yield _server_sent_event(self.answer.chunk([]) | {"usage": self.answer.usage()})
            if self.answer.says_done:
                yield b"data: [DONE]\n\n"
        except UserError as error:
            yield _server_sent_event(error_answer(error)[1])


def _sample_of(event: Event) -> object:
    """What consecutive tokens of one sample have in common; each other event is by itself."""
    return (event.index, event.sample) if isinstance(event, Piece) else id(event)


def _server_sent_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Ends when the client disconnects, and releases the slots even if that was before the first event."""

    def __init__(self, submission: Submission) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(submission.server_sent_events(), headers=headers, media_type="text/event-stream")
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.cancel()


def error_answer(error: UserError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    if isinstance(error, RequestError):
        return error.status, error_body(str(error), error.type, error.code, error.param), error.headers
    if isinstance(error, GrammarError):
        return 400, error_body(str(error), "invalid_request_error", "schema_too_complex"), {}
    if isinstance(error, RunError):
        return 500, error_body(str(error), "server_error"), {}
    return 400, error_body(str(error), "invalid_request_error"), {}


class Generator:
    """What the routes that generate share."""

    def __init__(self, models: Models, settings: Settings, store: StateStore) -> None:
        self._models, self._settings, self._store = models, settings, store
        # One large body at a time: parsing holds the interpreter, and memory of many times its size.
        self._one_large_body = CapacityLimiter(1)

    async def body(self, request: Request) -> tuple[bytes, CapacityLimiter | None]:
        """A request's body, and what limits how many like it are parsed at once. Raises RequestError."""
        content = await read_json_body(request, self._settings.max_body_bytes)
        return content, self._one_large_body if len(content) > _LARGE_BODY else None

    async def respond(
        self,
        request: Request,
        kind: type[CompletionRequest] | type[ChatRequest],
        answer: type[Answer],
        make: Any = Submission,
    ) -> Response:
        """The complete answer, or a stream. Raises UserError. make: Submission, or what is one."""
        content, limiter = await self.body(request)
        client = request.client.host if request.client else ""
        submit = partial(make, self._models, self._store, kind, answer, content, client, request.scope[OWNER],
                         asyncio.get_running_loop())  # fmt: skip
        submission = await to_thread.run_sync(submit, limiter=limiter)
        request.scope[TOKENS] = submission.answer
        if submission.body.stream:
            return EventStream(submission)
        async with cancelled_without_client(request.receive, submission.cancel):
            return Response(await submission.full_body(), media_type=JSON.media_type)
