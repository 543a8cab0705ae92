"""llama.cpp's own routes: /completion, /completions, /slots.

add_llama_routes(app, models, store, generator)

A slot of llama.cpp's keeps what it has read. Here a request that names one (`id_slot`) leaves the state after its prompt
there, and a later prompt that begins with the same tokens reads only the rest. Saving makes a state of it under the name
that the client gives (no path), which belongs to the key, counts against its quota and is deleted like any other.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from tnllm.generation.context import Context
from tnllm.generation.samples import Piece, Result, TokenLogprob
from tnllm.serving import bodies
from tnllm.serving.answers import SETTINGS, Answer, Scores
from tnllm.serving.api import CompletionRequest, validated
from tnllm.serving.bodies import Body, RequestError, shown
from tnllm.serving.generating import Generator, Submission
from tnllm.serving.middleware import JSON, OWNER
from tnllm.serving.openapi import described
from tnllm.serving.schemas import NativeCompletions, Slot, SlotAction, SlotList
from tnllm.serving.served import Models
from tnllm.serving.states import StateStore
from tnllm.serving.tickets import PromptRead

_STOP_TYPES = {"eos": "eos", "stop": "word", "length": "limit"}


class NativeRequest(CompletionRequest):
    """POST /completion: llama.cpp's names and ours."""

    other_names: ClassVar[dict[str, str]] = {
        "n_predict": "max_tokens",
        "repeat_penalty": "repetition_penalty",
        "n_probs": "logprobs",
    }

    n_predict: int | None = Field(None, ge=-1, description="Another name for max_tokens.")
    repeat_penalty: float | None = Field(None, gt=0, le=100, description="Another name for repetition_penalty.")
    n_probs: int | None = Field(None, ge=0, le=20, description="Another name for logprobs; 0 gives none.")
    id_slot: int = Field(-1, ge=-1, description="Slot whose state the prompt may continue; -1: none.")
    cache_prompt: bool = Field(True, description="Whether that state is used and left there.")
    return_tokens: bool = Field(False, description="Give the ids of the tokens; a stream always does.")

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = {key: value for key, value in values.items() if value is not None}
        for theirs, ours in cls.other_names.items():
            if theirs in values:
                if ours in values:
                    raise RequestError(f"{theirs} and {ours} are the same; give one of them", theirs)
                value = bodies.whole(values.pop(theirs))
                if theirs != "n_probs" or value != 0 or isinstance(value, bool):
                    values[ours] = value
        bias = values.get("logit_bias")
        if isinstance(bias, list):
            if not all(isinstance(one, list) and len(one) == 2 and type(one[0]) is int for one in bias):
                message = f"logit_bias is {shown(bias)}; allowed: pairs of a token id and a number"
                raise RequestError(message, "logit_bias")
            # false bans a token.
            values["logit_bias"] = {str(id): -100.0 if value is False else value for id, value in bias}
        return super()._translated(values)


class NativeAnswer(Answer):
    """Answers /completion."""

    says_done = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counts = [0] * self.num_choices

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return choices[0] if choices else {}

    def body(self, choices: list[dict[str, Any]]) -> Any:
        whole = [choice | {"timings": self.timings()} for choice in choices]
        return whole[0] if len(whole) == 1 else whole

    def piece(self, choice: int, pieces: list[Piece]) -> list[dict[str, Any]]:
        self._counts[choice] += len(pieces)
        logprobs = [one for piece in pieces for one in piece.logprobs]
        return [{
            "index": choice, "content": "".join([piece.text for piece in pieces]),
            "tokens": [piece.token for piece in pieces], "stop": False, "id_slot": self._request.id_slot,
            "tokens_predicted": self._counts[choice], "tokens_evaluated": len(self._prompts[choice // self.params.n]),
            **self._probabilities(logprobs),
        }]  # fmt: skip

    def last(self, choice: int, result: Result) -> list[dict[str, Any]]:
        end = self.full_choice(choice, result, None)
        # What was sent already.
        return [{**end, "content": "", "tokens": [], "timings": self.timings()}]

    def full_choice(self, choice: int, result: Result, prompt_logprobs: Scores) -> dict[str, Any]:
        request, index = self._request, choice // self.params.n
        given = request.prompt
        prompt = given if isinstance(given, str) else given[index] if isinstance(given[0], str) else None
        stop = ""
        if result.finish_reason == "stop":
            rest = self._tokenizer.decode(result.tokens)[len(result.text) :]
            stop = next((stop for stop in self.params.stop if rest.startswith(stop)), "")
        return {
            "index": choice,
            "content": (prompt or "") * request.echo + result.text,
            "tokens": result.tokens if request.return_tokens else [],
            "id_slot": request.id_slot,
            "stop": True,
            "stop_type": _STOP_TYPES[result.finish_reason],
            "stopping_word": stop,
            "model": self._head["model"],
            "prompt": prompt,
            "tokens_predicted": len(result.tokens),
            "tokens_evaluated": len(self._prompts[index]),
            "tokens_cached": self.cached_tokens,
            "truncated": False,
            "has_new_line": "\n" in result.text,
            "generation_settings": {name: getattr(self.params, name) for name in SETTINGS} | {"seed": result.seed},
            **self._probabilities(result.logprobs),
        }

    def _probabilities(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        if not entries:
            return {}
        tokens = [self._token(entry) | {"top_logprobs": list(map(self._token, entry.top))} for entry in entries]
        return {"completion_probabilities": tokens}

    def _token(self, entry: TokenLogprob) -> dict[str, Any]:
        return {"id": entry.id, **super()._token(entry)}


@dataclass(frozen=True)
class _Held:
    """What a slot has read: the context, its model's weights, and the tokens as a digest."""

    context: Context
    weights: str
    digest: str


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest()


class SlotStates:
    """What slots have read, for each owner; the least recently used go first when there are more than `most`."""

    def __init__(self, most: int, store: StateStore) -> None:
        self._most, self._store = most, store
        self._held: OrderedDict[tuple[str, int], _Held] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, owner: str, slot: int) -> _Held | None:
        with self._lock:
            return self._held.get((owner, slot))

    def put(self, owner: str, slot: int, held: _Held | None) -> None:
        """Replace what is in a slot; None empties it."""
        with self._lock:
            self._held.pop((owner, slot), None)
            if held is not None:
                self._held[owner, slot] = held
            while len(self._held) > self._most:
                self._held.popitem(last=False)

    def save(self, owner: str, slot: int, name: str) -> dict[str, Any]:
        """Make a state of what is in a slot; one that was saved under the name goes. Raises RequestError."""
        held, store = self.get(owner, slot), self._store
        if held is None:
            message = f"slot {slot} has read nothing; send /completion a prompt with id_slot {slot}"
            raise RequestError(message, "id_slot")
        with store.room(owner, held.context.nbytes):
            stored = store.add(owner, held.context, held.weights, file=name, digest=held.digest)
        for older in [one for one in store.states(owner) if one.file == name and one.id != stored.id]:
            store.delete(owner, older.id)
        return {"n_saved": stored.num_tokens, "n_written": stored.content.nbytes}

    def restore(self, owner: str, slot: int, name: str) -> dict[str, Any]:
        """Put what was saved into a slot. Raises RequestError."""
        store = self._store
        stored = next((one for one in store.states(owner) if one.file == name), None)
        if stored is None:
            message = f"filename is {shown(name)}; nothing was saved under it"
            raise RequestError(message, "filename", "state_not_found", 404)
        stored = store.get(owner, stored.id)
        self.put(owner, slot, _Held(store.context(stored), stored.content.weights, stored.digest))
        return {"n_restored": stored.num_tokens, "n_read": stored.content.nbytes}

    def erase(self, owner: str, slot: int, name: str) -> dict[str, Any]:
        held = self.get(owner, slot)
        self.put(owner, slot, None)
        return {"n_erased": held.context.num_tokens if held else 0}


class _SlotSubmission(Submission):
    """A request that may name a slot."""

    slots: SlotStates

    def prepare(
        self, owner: str, prompts: list[list[int]], start: Context | None
    ) -> tuple[list[list[int]], Context | None]:
        body, engine = self.body, self.served.engine
        assert isinstance(body, NativeRequest)
        if body.id_slot >= engine.num_slots:
            raise RequestError(f"id_slot is {body.id_slot}; allowed: -1 to {engine.num_slots - 1}", "id_slot")
        if body.id_slot < 0 or not body.cache_prompt or len(prompts) != 1 or start is not None:
            return prompts, start
        self.keeps_context, self._owner, self._ids = True, owner, prompts[0]
        held = self.slots.get(owner, body.id_slot)
        if held is None or held.weights != engine.weights or body.scored_prompt(self.answer.params) is not None:
            return prompts, start
        num_read = held.context.num_tokens
        if len(self._ids) < num_read or _digest(self._ids[:num_read]) != held.digest:
            return prompts, start
        return [self._ids[num_read:]], held.context

    def has_read(self, event: PromptRead) -> None:
        if event.context is not None:
            assert isinstance(self.body, NativeRequest)
            held = _Held(event.context, self.served.engine.weights, _digest(self._ids))
            self.slots.put(self._owner, self.body.id_slot, held)


class SlotRequest(Body):
    """POST /slots/{id}: the name of what is saved or restored; not for erase."""

    filename: str | None = Field(None, min_length=1, max_length=200, description="a name of 1 to 200 characters")


def add_llama_routes(app: FastAPI, models: Models, store: StateStore, generator: Generator) -> None:
    engine = models.first.engine
    slots = SlotStates(engine.num_slots, store)
    make = type("SlotSubmission", (_SlotSubmission,), {"slots": slots})

    @app.post("/completion", **described(NativeCompletions, NativeRequest))
    @app.post("/completions", **described(NativeCompletions, NativeRequest))
    async def completion(request: Request) -> Response:
        """Continue a text: llama.cpp's form of requests and answers."""
        return await generator.respond(request, NativeRequest, NativeAnswer, make)

    def checked(id: str) -> int:
        if not (id.isascii() and id.isdigit() and len(id) < 6 and int(id) < engine.num_slots):
            raise RequestError(f"the slot is {shown(id)}; allowed: 0 to {engine.num_slots - 1}", "id_slot")
        return int(id)

    @app.get("/slots", **described(SlotList))
    async def list_slots(request: Request) -> JSON:
        """The slots, and what this key's requests have put there."""
        active, owner = engine.num_slots - engine.slots.free, request.scope[OWNER]
        held = [slots.get(owner, id) for id in range(engine.num_slots)]
        return JSON([
            Slot(id=id, n_ctx=engine.max_prompt_tokens, is_processing=id < active,
                 n_past=one.context.num_tokens if one else 0).model_dump()
            for id, one in enumerate(held)
        ])  # fmt: skip

    @app.post("/slots/{id}", **described(SlotAction, SlotRequest))
    async def act(request: Request, id: str) -> JSON:
        """save, restore or erase (the query's `action`) the state of a slot."""
        slot, owner, began = checked(id), request.scope[OWNER], time.monotonic()
        action = request.query_params.get("action", "")
        if action not in ("save", "restore", "erase"):
            raise RequestError(f"action is {shown(action)}; allowed: save, restore, erase", "action")
        content, _ = await generator.body(request)
        name = validated(SlotRequest, content or b"{}").filename
        if (name is None) != (action == "erase"):
            raise RequestError("filename is the name of what is saved or restored; erase has none", "filename")
        work = {"save": slots.save, "restore": slots.restore, "erase": slots.erase}[action]
        answer = {"id_slot": slot, **await run_in_threadpool(work, owner, slot, name or "")}
        if name is not None:
            answer |= {"filename": name, "timings": {f"{action}_ms": round(1e3 * (time.monotonic() - began), 3)}}
        return JSON(answer)
