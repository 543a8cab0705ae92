"""States that clients keep on the server: what was read once, continued any number of times.

    store = StateStore(loaded, weights, metrics, max_bytes=1 << 30, folder=Path("states"))
    with store.room(owner, store.estimate(num_tokens)):     # before the text is read
        context = ...
        stored = store.add(owner, context, weights)
    context = store.context(store.get(owner, stored.id))    # raises RequestError for anybody else's

A context is immutable, so a fork is another name for it, and who continues it keeps it when it is deleted. With a folder,
each state is ID.json, which names a content-*.safetensors that forks share; without one nothing is written. Both are
written before a client is told of them. Files are read back, and checked, when their state is next used.
"""

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tnllm import __version__
from tnllm.errors import UserError
from tnllm.files import write_bytes_atomic
from tnllm.generation.context import Context, context_bytes, context_from_bytes, metadata_of_bytes
from tnllm.generation.loading import LoadedModel
from tnllm.modeling.flops import state_bytes
from tnllm.progress import log
from tnllm.serving.bodies import RequestError, shown
from tnllm.serving.metrics import Metrics

# What a state takes beside its context, which forks share.
ENTRY_BYTES = 4096
_NAME = re.compile(r"(state-[0-9a-f]{32}\.json|content-[0-9a-f]{32}\.safetensors)(\.tmp-\d+)?")
_SWEEP_SECONDS = 60


@dataclass(eq=False)
class _Content:
    """A context that one owner's states share."""

    name: str
    nbytes: int
    weights: str  # hash of those of its model
    context: Context | None  # None: in the folder, not read yet
    num_states: int = 0


@dataclass(eq=False)
class Stored:
    id: str
    owner: str
    content: _Content
    num_tokens: int
    awaits_answer: bool  # whether it ends where an answer begins
    created: float  # seconds since 1970
    used: float
    seconds: int  # without use until it expires
    # Of a slot's state that was saved: the file's name that a client gave, and a digest of the tokens.
    file: str = ""
    digest: str = ""

    @property
    def expires(self) -> float:
        return self.used + self.seconds


class StateStore:
    """The states of all owners; an owner is a digest of an API key, or empty. Any thread may call it."""

    def __init__(
        self,
        loaded: LoadedModel,
        weights: str,
        metrics: Metrics,
        max_bytes: int = 1 << 30,
        max_bytes_of_owner: int | None = None,
        seconds: int = 86_400,
        folder: Path | None = None,
        more: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        """Limits of all states and of one owner's; seconds without use until a state expires. more: other models of the
        same shape, dtype and tokenizer, by the hash of their weights.
        """
        self._loaded, self._metrics, self.seconds = loaded, metrics, seconds
        self._models = {weights: loaded, **(more or {})}
        self.max_bytes = max_bytes
        self.max_bytes_of_owner = max_bytes if max_bytes_of_owner is None else min(max_bytes, max_bytes_of_owner)
        self._folder = folder
        self._lock = threading.RLock()
        self._states: dict[str, Stored] = {}  # in the order of their making
        self._reserved: list[tuple[str, int]] = []
        self.identity = {
            "dtype": loaded.model.dtype_name,
            "tokenizer": loaded.tokenizer.sha256,
        }
        metrics.gauges.append(self._gauges)
        if folder is not None:
            self._open(folder)
        self._swept = time.monotonic()
        threading.Thread(target=self._sweep_for_ever, name="tnllm-states", daemon=True).start()

    def _gauges(self) -> dict[str, int]:
        with self._lock:
            return {"states": len(self._states), "state_bytes": self._used()}

    def _used(self, owner: str | None = None) -> int:
        """Bytes of an owner's states, or of all, those being made included."""
        states = [state for state in self._states.values() if owner in (None, state.owner)]
        contents = {state.content for state in states}
        reserved = sum(size for of, size in self._reserved if owner in (None, of))
        return len(states) * ENTRY_BYTES + sum(content.nbytes for content in contents) + reserved

    def estimate(self, num_tokens: int) -> int:
        """Bytes of the context after so many tokens."""
        config = self._loaded.model.config
        return int(state_bytes(config, num_tokens)) + 5 * config.vocab_size

    @contextmanager
    def room(self, owner: str, size: int) -> Iterator[None]:
        """Room for a state of `size` bytes while it is made. Raises RequestError if there is none."""
        reserved = (owner, size + ENTRY_BYTES)
        with self._lock:
            self._sweep()
            for used, most, whose in (
                (self._used(owner), self.max_bytes_of_owner, "your states take"),
                (self._used(), self.max_bytes, "the states of this server take"),
            ):
                if used + reserved[1] > most:
                    self._metrics.states_refused += 1
                    message = f"no room for {reserved[1]} bytes: {whose} {used}, of {most} allowed; delete some"
                    raise RequestError(message, code="state_quota_exceeded", status=413)
            self._reserved.append(reserved)
        try:
            yield
        finally:
            with self._lock:
                self._reserved.remove(reserved)

    def add(
        self, owner: str, context: Context, weights: str, awaits_answer: bool = False, seconds: int | None = None,
        file: str = "",
        digest: str = "",
    ) -> Stored:  # fmt: skip
        """Keep a context of the model with these weights, for which `room` was made; `file` and `digest` as
        in Stored. Raises RequestError if the disk is full.
        """
        content = _Content(f"content-{secrets.token_hex(16)}", context.nbytes, weights, context)
        stored = replace(
            self._new(owner, content, context.num_tokens, awaits_answer, seconds), file=file, digest=digest
        )
        self._write(content.name + ".safetensors", self.to_bytes(stored))
        return self._keep(stored)

    def fork(self, stored: Stored, seconds: int | None = None) -> Stored:
        """Another state with the same context. Raises RequestError as `room` and `add` do."""
        with self.room(stored.owner, 0), self._lock:
            self._check_kept(stored)
            return self._keep(self._new(stored.owner, stored.content, stored.num_tokens, stored.awaits_answer, seconds))

    def _new(self, owner: str, content: _Content, num_tokens: int, awaits_answer: bool, seconds: int | None) -> Stored:
        id, now = f"state-{secrets.token_hex(16)}", time.time()
        return Stored(
            id, owner, content, num_tokens, awaits_answer, now, now, min(seconds or self.seconds, self.seconds)
        )

    def _keep(self, stored: Stored) -> Stored:
        record = {name: getattr(stored, name) for name in (*_RECORD, *_SLOT)} | {
            "content": stored.content.name, "nbytes": stored.content.nbytes, "weights": stored.content.weights,
            **self.identity,
        }  # fmt: skip
        with self._lock:
            # Counted first: another state's deletion must not remove a file that this one is about to share.
            stored.content.num_states += 1
        try:
            self._write(stored.id + ".json", json.dumps(record).encode())
        except RequestError:
            self._release(stored.content)
            raise
        with self._lock:
            self._states[stored.id] = stored
            self._metrics.states_made += 1
        return stored

    def get(self, owner: str, id: Any) -> Stored:
        """The owner's state of this id; it counts as used. Raises RequestError, the same for another's as for none."""
        with self._lock:
            self._sweep(id if isinstance(id, str) else None)
            stored = self._states.get(id) if isinstance(id, str) else None
            if stored is None or stored.owner != owner:
                raise _no_state(id)
            stored.used = time.time()
        if self._folder is not None:
            with suppress(OSError):
                os.utime(self._folder / f"{id}.json")
        return stored

    def _check_kept(self, stored: Stored) -> None:
        """Raise RequestError if the state was deleted or replaced since it was looked up: its file may be gone."""
        if self._states.get(stored.id) is not stored:
            raise _no_state(stored.id)

    def states(self, owner: str) -> list[Stored]:
        """The owner's states, oldest first."""
        with self._lock:
            self._sweep()
            return [state for state in self._states.values() if state.owner == owner]

    def delete(self, owner: str, id: str) -> None:
        """Forget a state. Requests that continue it keep its context. Raises RequestError if there is none."""
        self._remove(self.get(owner, id))

    def context(self, stored: Stored) -> Context:
        """The context of a state. Raises RequestError if its file is lost or damaged; then the state is, too."""
        content = stored.content
        with self._lock:
            if content.context is None:
                assert self._folder is not None
                try:
                    data = (self._folder / f"{content.name}.safetensors").read_bytes()
                    content.context, _ = self.parse(data, "the file of this state")
                except (OSError, UserError) as error:
                    self._remove(stored)
                    reason = error.strerror if isinstance(error, OSError) else error
                    message = f"the state is lost: {reason}"
                    raise RequestError(message, "state", "state_damaged", 410) from None
            return content.context

    def to_bytes(self, stored: Stored) -> bytes:
        """The state as a safetensors file."""
        more = {**self.identity, "version": __version__, "awaits_answer": "1" if stored.awaits_answer else ""}
        return context_bytes(self.context(stored), stored.content.weights, **more)

    def parse(self, data: bytes, name: str) -> tuple[Context, str]:
        """The context in a safetensors file, and its weights. Raises UserError unless it is whole and a served model's."""
        metadata = metadata_of_bytes(data, name)
        for key, ours in self.identity.items():
            if metadata.get(key, ours) != ours:
                raise UserError(f"{name} was made with the {key} {metadata[key][:12]}; this server has {ours[:12]}")
        weights = metadata["weights"] if metadata["weights"] in self._models else next(iter(self._models))
        return context_from_bytes(data, metadata, self._models[weights].model, weights, name, device="cpu"), weights

    def upload(self, owner: str, data: bytes, id: str | None = None) -> Stored:
        """Keep the state in a safetensors file: as a new one, or in place of the context of `id`. Raises RequestError."""
        old = None if id is None else self.get(owner, id)
        try:
            context, weights = self.parse(data, "the upload")
        except UserError as error:
            raise RequestError(str(error), code="state_refused") from None
        awaits_answer = metadata_of_bytes(data, "the upload").get("awaits_answer") == "1"
        if old is None:
            return self.add(owner, context, weights, awaits_answer)
        content = _Content(f"content-{secrets.token_hex(16)}", context.nbytes, weights, context)
        new = Stored(old.id, owner, content, context.num_tokens, awaits_answer, old.created, time.time(), old.seconds)
        self._write(content.name + ".safetensors", self.to_bytes(new))
        with self._lock:
            try:
                # Released once: forks may share the old content.
                self._check_kept(old)
            except RequestError:
                content.num_states = 1
                self._release(content)
                raise
            self._keep(new)
            self._release(old.content)
        return new

    def _write(self, name: str, data: bytes) -> None:
        if self._folder is None:
            return
        try:
            write_bytes_atomic(self._folder / name, data)
        except OSError as error:
            self._metrics.states_refused += 1
            message = f"the state could not be written ({error.strerror}); nothing was kept"
            raise RequestError(message, code="state_not_written", status=507) from None

    def _remove(self, stored: Stored) -> None:
        with self._lock:
            if self._states.get(stored.id) is not stored:
                return
            del self._states[stored.id]
            if self._folder is not None:
                (self._folder / f"{stored.id}.json").unlink(missing_ok=True)
            self._release(stored.content)

    def _release(self, content: _Content) -> None:
        with self._lock:
            content.num_states -= 1
            if not content.num_states and self._folder is not None:
                (self._folder / f"{content.name}.safetensors").unlink(missing_ok=True)

    def _sweep(self, id: str | None = None) -> None:
        """Delete what has expired: `id`, and from time to time everything."""
        now = time.time()
        states = [self._states[id]] if id in self._states else []
        if time.monotonic() - self._swept > 1:
            self._swept, states = time.monotonic(), list(self._states.values())
        for state in states:
            if state.expires <= now:
                self._remove(state)
                self._metrics.states_expired += 1

    def _sweep_for_ever(self) -> None:
        while True:
            time.sleep(_SWEEP_SECONDS)
            with self._lock:
                self._sweep()

    def _open(self, folder: Path) -> None:
        """Take what an earlier server left; other models' states stay on the disk."""
        folder.chmod(0o700)
        contents: dict[tuple[str, str], _Content] = {}
        named, foreign = set(), 0
        for path in sorted(folder.glob("state-*.json"), key=lambda path: path.stat().st_mtime):
            try:
                record = json.loads(path.read_bytes())
                content = _Content(str(record["content"]), int(record["nbytes"]), str(record["weights"]), None)
                values = {name: record[name] for name in _RECORD}
                values |= {name: str(record.get(name, "")) for name in _SLOT}
                stored = Stored(path.stem, content=content, used=path.stat().st_mtime, **values)
                is_ours = content.weights in self._models and all(
                    record[key] == one for key, one in self.identity.items()
                )
                if not _NAME.fullmatch(path.name) or not _NAME.fullmatch(f"{content.name}.safetensors"):
                    raise ValueError("name")
                stored.seconds = min(int(stored.seconds), self.seconds)
                if not isinstance(stored.created, float) or not isinstance(stored.num_tokens, int):
                    raise TypeError("times")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                log(f"{path} is not the record of a state; it is left alone")
                continue
            named.add(content.name)
            if not is_ours:
                foreign += 1
                continue
            stored.content = contents.setdefault((stored.owner, content.name), content)
            stored.content.num_states += 1
            self._states[stored.id] = stored
        for path in folder.iterdir():
            # What a process that was killed had begun.
            match = _NAME.fullmatch(path.name)
            if match and (match[2] or (path.suffix == ".safetensors" and path.stem not in named)):
                path.unlink()
        if foreign:
            log(f"{folder} holds {foreign} states of another model, dtype or tokenizer; they are not served")


def _no_state(id: Any) -> RequestError:
    message = f"there is no state {shown(id)} of this key; it may have expired or been deleted"
    return RequestError(message, "state", "state_not_found", 404)


_RECORD = ("owner", "num_tokens", "awaits_answer", "created", "seconds")
_SLOT = ("file", "digest")
