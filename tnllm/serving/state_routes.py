"""The routes of /v1/states.

add_state_routes(app, models, settings, StateStore(engine.loaded, engine.weights, engine.metrics))
"""

import asyncio
import contextlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from tnllm import __version__
from tnllm.serving.answers import usage
from tnllm.serving.api import StateRequest, validated
from tnllm.serving.bodies import RequestError, shown
from tnllm.serving.engine import Engine
from tnllm.serving.generating import cancelled_without_client, refusals_of
from tnllm.serving.middleware import JSON, OWNER, Settings, read_body, read_json_body
from tnllm.serving.openapi import described
from tnllm.serving.schemas import StateDeleted, StateList, StateObject
from tnllm.serving.served import Models
from tnllm.serving.states import StateStore, Stored
from tnllm.serving.tickets import Event, Failed, PromptRead, Ticket

_BINARY = "application/octet-stream"
_UPLOAD = {"requestBody": {"required": True, "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}}}
_MOST_LISTED = 1000
# Of a file, beside its tensors.
_HEADER_BYTES = 1 << 18


class _Answers:
    def __init__(self, models: Models, settings: Settings, store: StateStore) -> None:
        self._models, self._settings, self._store = models, settings, store

    def shown(self, stored: Stored, read: PromptRead | None = None) -> dict[str, Any]:
        """A state as JSON, and what was read for it."""
        served = self._models.of(stored)
        body: dict[str, Any] = {
            "id": stored.id,
            "object": "state",
            "created": int(stored.created),
            "expires_at": int(stored.expires),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
            **self._store.identity,
            "version": __version__,
            "bytes": stored.content.nbytes,
            "tokens": stored.num_tokens,
            "awaits_answer": stored.awaits_answer,
        }
        if read is not None:
            body["usage"] = usage(read.prompt_tokens, 0, read.cached_tokens)
        return body

    async def read(self, request: Request, before: str | None) -> JSON:
        """A new state, after the one of id `before`. Raises UserError."""
        content = await read_json_body(request, self._settings.max_body_bytes)
        owner, loop = request.scope[OWNER], asyncio.get_running_loop()
        client = request.client.host if request.client else ""

        def parse() -> tuple[StateRequest, Stored | None, Engine, list[int] | None, bool]:
            body = validated(StateRequest, content, self._models.first.engine.max_prompt_tokens)
            stored = None if before is None else self._store.get(owner, before)
            engine = self._models.chosen(body.model, stored).engine
            awaits = stored is not None and stored.awaits_answer
            return body, stored, engine, *body.ids(engine.loaded, engine.max_prompt_tokens, stored is None, awaits)

        body, stored, engine, ids, awaits_answer = await run_in_threadpool(parse)
        if ids is None:
            assert stored is not None
            return JSON(self.shown(await run_in_threadpool(self._store.fork, stored, body.expires_in)))
        start = None if stored is None else await run_in_threadpool(self._store.context, stored)
        num_tokens = len(ids) + (stored.num_tokens if stored is not None else 0)
        with self._store.room(owner, self._store.estimate(num_tokens)):
            queue: asyncio.Queue[Event] = asyncio.Queue()

            def deliver(events: list[Event]) -> None:
                # A closed loop has no connections.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(queue.put_nowait, events[0])

            def submit() -> Ticket:
                nothing = engine.loaded.params(max_tokens=0)
                with refusals_of("prompt" if body.messages is None else "messages"):
                    return engine.submit(ids, nothing, client=client, start=start, keep_context=True, deliver=deliver)

            ticket = await run_in_threadpool(submit)
            async with cancelled_without_client(request.receive, ticket.cancel):
                read = await queue.get()
            if isinstance(read, Failed):
                raise read.error
            assert isinstance(read, PromptRead) and read.context is not None
            made = await run_in_threadpool(
                self._store.add, owner, read.context, engine.weights, awaits_answer, body.expires_in
            )
        return JSON(self.shown(made, read))

    async def upload(self, request: Request, id: str | None) -> JSON:
        """A new state from a file, or that of `id` with the file's context. Raises RequestError."""
        owner = request.scope[OWNER]
        length = request.headers.get("content-length", "")
        if not length.isdigit() or len(length) > 18:
            raise RequestError("an upload needs a Content-Length", status=411)
        state = self._models.first.engine.loaded.model.init_state(1)
        most = self._store.estimate(0) + _HEADER_BYTES if not state.grows else self._store.max_bytes
        if int(length) > most:
            message = f"the upload has {length} bytes; a state of this model has at most {most}"
            raise RequestError(message, code="body_too_large", status=413, headers={"Connection": "close"})
        if id is not None:
            self._store.get(owner, id)
        with self._store.room(owner, int(length)):
            data = await read_body(request, int(length))
            return JSON(self.shown(await run_in_threadpool(self._store.upload, owner, data, id)))


def add_state_routes(app: FastAPI, models: Models, settings: Settings, store: StateStore) -> None:
    """Reading, forking, listing, deleting, and files of states."""
    answers = _Answers(models, settings, store)

    @app.post("/v1/states", **described(StateObject, StateRequest))
    async def make_state(request: Request) -> JSON:
        """Read a text or messages, and keep the state after them; or keep an uploaded one."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() == _BINARY:
            return await answers.upload(request, None)
        return await answers.read(request, None)

    @app.get("/v1/states", **described(StateList))
    async def list_states(request: Request) -> JSON:
        """The states of this key, oldest first: `limit` of them (100; at most 1000) after the id `after`."""
        limit, after = request.query_params.get("limit", "100"), request.query_params.get("after")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= _MOST_LISTED):
            raise RequestError(f"limit is {shown(limit)}; allowed: a whole number, 1 to {_MOST_LISTED}", "limit")
        if settings.states_are_hidden:
            message = "without API keys, states are not listed here: one client would learn of another's"
            raise RequestError(message, code="states_not_listed", status=403)
        states = await run_in_threadpool(store.states, request.scope[OWNER])
        if after is not None:
            index = next((index for index, state in enumerate(states) if state.id == after), None)
            if index is None:
                raise RequestError(f"after is {shown(after)}; allowed: the id of a state of this key", "after")
            states = states[index + 1 :]
        data = [answers.shown(state) for state in states[: int(limit)]]
        return JSON({"object": "list", "data": data, "has_more": len(data) < len(states)})

    @app.get("/v1/states/{id}", **described(StateObject))
    async def get_state(request: Request, id: str) -> JSON:
        """A state of this key."""
        return JSON(answers.shown(await run_in_threadpool(store.get, request.scope[OWNER], id)))

    @app.delete("/v1/states/{id}", **described(StateDeleted))
    async def delete_state(request: Request, id: str) -> JSON:
        """Forget a state. Texts that continue it are not interrupted."""
        await run_in_threadpool(store.delete, request.scope[OWNER], id)
        return JSON({"id": id, "object": "state", "deleted": True})

    @app.post("/v1/states/{id}/fork", **described(StateObject, StateRequest))
    async def fork_state(request: Request, id: str) -> JSON:
        """Another state with the same past, after which it reads what is given, if anything."""
        return await answers.read(request, id)

    @app.get("/v1/states/{id}/content", response_class=Response, **described(None, media_type=_BINARY))
    async def download(request: Request, id: str) -> Response:
        """The state as a safetensors file."""
        data = await run_in_threadpool(lambda: store.to_bytes(store.get(request.scope[OWNER], id)))
        headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"', "Cache-Control": "no-store"}
        return Response(data, media_type=_BINARY, headers=headers)

    @app.put("/v1/states/{id}/content", **described(StateObject), openapi_extra=_UPLOAD)
    async def replace(request: Request, id: str) -> JSON:
        """Put an uploaded safetensors file in place of what a state of this key holds."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != _BINARY:
            raise RequestError(f"an upload must be sent with 'Content-Type: {_BINARY}'", status=415)
        return await answers.upload(request, id)
