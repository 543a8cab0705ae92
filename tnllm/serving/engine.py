"""Continuous batching: requests join and leave at every step, long prompts are read between steps.

    with Engine(loaded, num_slots=32) as engine:
        ticket = engine.submit(ids, loaded.params(max_tokens=50, seed=1))
        for event in ticket:                     # Piece, Result for each sample; raises what went wrong
            ...
        ticket.cancel()                          # from any thread, at any time

One thread owns the model and all tensors. Each turn it admits waiting requests, prefills at most `prefill_tokens` of their
prompts (shared evenly) and decodes a few tokens of every row: no request waits for another's prompt or text to end. A
sample depends on its prompt, options and seed alone, so it equals what `generate` gives.

The scheduler divides the slots among clients and requests; a row that loses its slot is parked and continues later. When
`queue_size` prompts wait, `submit` raises Busy with the seconds after which to try again.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.context import Context, after_reading, weights_hash
from tnllm.generation.loading import LoadedModel
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Row, TokenLogprob, start_rows, token_logprob
from tnllm.generation.scoring import score_tokens
from tnllm.generation.slots import Parked, Slots
from tnllm.modeling.flops import state_bytes
from tnllm.modeling.packing import pack
from tnllm.modeling.state import State
from tnllm.serving.metrics import Metrics
from tnllm.serving.prefix_cache import PrefixCache
from tnllm.serving.scheduler import Scheduler
from tnllm.serving.tickets import Busy, Event, Failed, PromptRead, Ticket, TooLong

# Prompt tokens prefilled between two decoding steps. On a CPU they cost about as much as a few steps, so that running texts
# slow down but do not stop; on a GPU they are enough to keep it busy.
PREFILL_TOKENS = {"cpu": 128, "cuda": 2048}
# Host memory for the states of rows that lost their slots: 1,500 rows of the demo model, 150 of the 385M.
_PARKED_BYTES = 2 << 30
# Of a parked sample of a model with key-value caches, to count how many fit.
_CACHE_TOKENS = 4096


@dataclass(eq=False)
class _Job:
    """A prompt from submission until the last of its rows has ended."""

    index: int  # of the prompt in its request
    ids: np.ndarray  # [T] int64
    params: SamplingParams
    request: Ticket
    client: str
    prompt_logprobs: int | None
    submitted: float
    start: Context | None = None  # what the prompt follows
    keep_context: bool = False
    cached: Context | None = None  # of the longest cached prefix
    state: State | None = None  # after ids[:done]
    done: int = 0
    cache_at: int = 0  # length of the prefix shared with an earlier prompt: its context is cached
    behind: "_Job | None" = None  # which is reading that prefix at the moment: its context is waited for
    logits: Tensor | None = None  # [1, V] after the last token read
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    started: float = 0.0  # reading
    first_token: float | None = None

    @property
    def num_samples(self) -> int:
        return self.params.n


@dataclass(eq=False)
class _Sample:
    """A row, and what it continues from while it has no slot."""

    job: _Job
    row: Row
    parked: Parked | None


class Turns:
    """A lock that is given in the order in which it was asked for, so that no engine waits while another has two turns."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._next = self._served = 0

    def __enter__(self) -> None:
        with self._change:
            number, self._next = self._next, self._next + 1
            self._change.wait_for(lambda: self._served == number)

    def __exit__(self, *error: object) -> None:
        with self._change:
            self._served += 1
            self._change.notify_all()


def _slices(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Parts of token ids, for work during which no other thread runs."""
    return (ids[start : start + 32_768] for start in range(0, len(ids), 32_768))


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.array([], np.int64), *(np.array(part, dtype=np.int64) for part in _slices(ids))])


class Engine:
    """Serves one model. Use as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_slots: int = 32,
        queue_size: int = 512,
        prefill_tokens: int | None = None,
        cache_bytes: int = 1 << 28,
        max_prompt_tokens: int = 1 << 20,
        max_new_tokens: int = 1 << 16,
        beside: "Engine | None" = None,
    ) -> None:
        """num_slots: texts decoded together. queue_size: requests that may wait for a slot. cache_bytes: size of the
        prefix cache; 0 turns it off. The next two limit a single request. beside: another engine on the same device; the
        two take turns and share their metrics. Raises UserError for a model that cannot be served.
        """
        model = loaded.model
        self.loaded, self.num_slots, self.queue_size = loaded, num_slots, queue_size
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS[model.device.type]
        loaded.tokenizer.check_vocabulary(model.config.vocab_size)
        self.slots = Slots(model, loaded.tokenizer, num_slots)
        self.weights = weights_hash(model)
        self.cache = PrefixCache(self.weights, cache_bytes)
        self.metrics: Metrics = Metrics() if beside is None else beside.metrics
        self.metrics.gauges.append(self._gauges)
        if beside is None and model.device.type == "cuda":
            self.metrics.gauges.append(
                lambda: {"device_memory_peak_bytes": torch.cuda.max_memory_allocated(model.device)}
            )
        self._device: Turns = Turns() if beside is None else beside._device
        self._ends = frozenset(loaded.eos_ids)
        self._wake = threading.Condition()
        row_bytes = self.slots.nbytes // num_slots + state_bytes(model.config, _CACHE_TOKENS)
        # Used only while holding `_wake`.
        self.scheduler: Scheduler[_Job, _Sample] = Scheduler(
            num_slots, queue_size, max(num_slots, _PARKED_BYTES // row_bytes)
        )
        self._samples: dict[Row, _Sample] = {}  # in slots
        self._num_cut = 0
        self._stopping = self._abandon = False
        self._thread = threading.Thread(target=self._run, name="tnllm-engine", daemon=True)

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(finish=error[0] is None)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> int:
        """Accept no more requests; those already accepted are finished. Returns how many these are."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
            return self.scheduler.num_requests

    def stop(self, finish: bool = True, timeout_s: float | None = None) -> int:
        """Drain and wait; with finish=False, or after `timeout_s`, cut what is left.

        Returns how many requests were cut.
        """
        self.drain()
        if finish:
            self._thread.join(timeout_s)
        with self._wake:
            self._abandon = True
            self._wake.notify()
        self._thread.join()
        return self._num_cut

    @property
    def num_active(self) -> int:
        """Prompts that are being read, and samples of those that were."""
        with self._wake:
            return self.scheduler.num_active

    @property
    def num_waiting(self) -> int:
        """Prompts in the queue."""
        with self._wake:
            return self.scheduler.num_waiting

    def _gauges(self) -> dict[str, int]:
        with self._wake:
            return {
                "requests_waiting": self.scheduler.num_waiting,
                "requests_active": self.scheduler.num_active,
                "slots": self.num_slots,
                "slots_free": self.slots.free,
                "samples_parked": self.scheduler.num_parked,
                "prefix_cache_bytes": self.cache.num_bytes,
                "prefix_cache_entries": len(self.cache),
            }

    @property
    def stopping(self) -> bool:
        """Whether all further requests are refused."""
        return self._stopping or not self._thread.is_alive()

    def check(self, ids: Sequence[int], params: SamplingParams, start: Context | None = None) -> None:
        """Raise UserError for a request that this engine refuses."""
        config = self.loaded.model.config
        if not ids and start is None:
            raise UserError("the prompt is empty; give text, or the begin token to start from nothing")
        before = start.num_tokens if start is not None else 0
        # A state of constant size may follow any number of tokens.
        length = len(ids) + (before if start is not None and start.state.grows else 0)
        if length > self.max_prompt_tokens:
            raise TooLong(f"the prompt has {length} tokens; this server takes at most {self.max_prompt_tokens}")
        if params.max_tokens > self.max_new_tokens:
            raise UserError(f"max_tokens is {params.max_tokens}; this server gives at most {self.max_new_tokens}")
        vocab_size = self.loaded.tokenizer.vocab_size
        for part in (*_slices(ids), [id for id, _ in params.logit_bias] or [0]):
            if not 0 <= min(part) <= max(part) < vocab_size:
                bad = next(id for id in part if not 0 <= id < vocab_size)
                raise UserError(f"token id {bad} is outside the vocabulary of {vocab_size}")
        if config.position == "ape" and before + len(ids) + params.max_tokens > config.max_position:
            raise TooLong(
                f"prompt and max_tokens are {before + len(ids) + params.max_tokens} tokens; this model has learned "
                f"{config.max_position} positions"
            )

    def submit(self, ids: Sequence[int], params: SamplingParams, **more: Any) -> Ticket:
        """`submit_all` of one prompt."""
        return self.submit_all([ids], params, **more)

    def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        client: str = "",
        prompt_logprobs: int | None = None,
        start: Context | None = None,
        keep_context: bool = False,
        deliver: Callable[[list[Event]], None] | None = None,
    ) -> Ticket:
        """Queue all prompts or none, from any thread; `deliver` is called on the engine's thread with their events.

        The events of a prompt are in order. client: clients take turns. prompt_logprobs: return those of the prompt's
        tokens too, with so many most likely alternatives. start: every prompt follows it, and may be empty.
        keep_context: deliver the context after each prompt. Raises UserError for a bad request, Busy if the
        queue has no room for all prompts, or the engine stops.
        """
        for ids in prompts:
            self.check(ids, params, start)
        if len(prompts) > self.queue_size:
            raise UserError(f"the request has {len(prompts)} prompts; the queue of this server holds {self.queue_size}")
        ticket, now = Ticket(len(prompts) * params.n, deliver), time.monotonic()
        jobs = [
            _Job(index, _array(ids), params, ticket, client, prompt_logprobs, now, start, keep_context)
            for index, ids in enumerate(prompts)
        ]
        with self._wake:
            if self.stopping:
                raise Busy("the server is shutting down; try another one", 10, stopping=True)
            if not self.scheduler.submit(jobs):
                self.metrics.refused += 1
                raise Busy(
                    f"{self.num_waiting} prompts are waiting, and the queue holds {self.queue_size}: there is no room for "
                    f"{len(jobs)} more; try again later",
                    self.metrics.retry_after_s(),
                )
            self._wake.notify()
        return ticket

    def _run(self) -> None:
        if self.loaded.model.device.type == "cuda":
            torch.cuda.set_device(self.loaded.model.device)
        try:
            with self._device:
                self.slots.warm_up()
            while self._turn():
                pass
        except BaseException as error:
            # No request may wait for ever for a thread that has ended.
            with self._wake:
                self._stopping = True
            self._fail_all(RunError(f"the engine stopped: {error}"))
            raise

    def _turn(self) -> bool:
        """Admit, prefill, decode. Returns False when the engine has stopped."""
        with self._wake:
            while not (self._abandon or self.scheduler.num_requests):
                if self._stopping:
                    return False
                self._wake.wait()
        if self._abandon:
            self._fail_all(Busy("the server shut down before the text was finished", 10, stopping=True))
            return False
        with self._device:
            with self._wake:
                self._drop_cancelled()
                admitted = self.scheduler.admit()
            for job in admitted:
                self._start_reading(job)
            if self.scheduler.reading:
                self._prefill()
            self._change_rows()
            if self.slots.rows:
                self._decode()
        return True

    def _drop_cancelled(self) -> None:
        jobs = [job for job in self.scheduler.jobs if job.request.cancelled.is_set()]
        for job in jobs:
            self._drop(job)
        for ticket in {job.request for job in jobs}:
            self.metrics.cancelled += 1
            ticket.deliver([Failed(RunError("the request was cancelled"))])

    def _drop(self, job: _Job) -> None:
        """Forget a job and free its slots."""
        with self._wake:
            held = self.scheduler.remove(job)
        for sample in held:
            # A row that just failed has left already.
            if self._samples.pop(sample.row, None):
                self.slots.leave(sample.row)

    def _start_reading(self, job: _Job) -> None:
        job.started = time.monotonic()
        self.metrics.queue_s.observe(job.started - job.submitted)
        if job.start is not None:
            # On this thread, to which the device belongs.
            device = self.loaded.model.device
            job.state, job.logits = job.start.state.to(device), job.start.logits.to(device)
            return
        if job.prompt_logprobs is None:
            job.cached = self.cache.longest(job.ids)
            job.cache_at = self.cache.branch(job.ids)
            job.behind = self._reader_of(job)
        if job.cached is not None:
            job.done, job.logits = job.cached.num_tokens, job.cached.logits
        job.state = job.cached.state if job.cached is not None else self.loaded.model.init_state(1)

    def _reader_of(self, job: _Job) -> _Job | None:
        """The earlier prompt that will have read the prefix which `job` shares, so that many at once read it once."""
        end = job.cache_at
        for other in takewhile(lambda other: other is not job, self.scheduler.reading if end else ()):
            # A prompt stops at one length only; of those that stop at none yet, or have, this becomes the length.
            stops = other.cache_at == end or other.cache_at <= other.done
            usable = stops and other.done < end and other.start is None and other.prompt_logprobs is None
            if usable and other.behind is None and np.array_equal(other.ids[:end], job.ids[:end]):
                other.cache_at = end
                return other
        return None

    def _change_rows(self) -> None:
        """Park the rows whose turn has ended, and continue others."""
        with self._wake:
            parked, joined = self.scheduler.turns()
        for sample in parked:
            del self._samples[sample.row]
            sample.parked = self.slots.park(sample.row)
        self.metrics.parks += len(parked)
        for sample in joined:
            assert sample.parked is not None
            self.slots.join(sample.row, sample.parked)
            self._samples[sample.row], sample.parked = sample, None

    @torch.no_grad()
    def _prefill(self) -> None:
        """One pass over parts of prompts, packed, so that padding never enters a state."""
        model = self.loaded.model
        # With many running texts a step is slow; more room for each step lets a long queue of prompts end sooner.
        room = max(self._prefill_tokens, 2 * len(self.slots.rows))
        reading = set(self.scheduler.reading)
        for job in self.scheduler.reading:
            # Whose reader was cancelled.
            job.behind = job.behind if job.behind in reading else None
        pieces = [(job, share) for job, share in self.scheduler.shares(room) if share]
        if pieces:
            tokens, cu_seqlens = pack([job.ids[job.done : job.done + share] for job, share in pieces])
            ends = cu_seqlens[1:].tolist()
            states = [job.state for job, _ in pieces if job.state is not None]
            if len(pieces) == 1:
                hidden, after = model.hidden(tokens.to(model.device), states[0])
            else:
                hidden, after = model.hidden(tokens.to(model.device), State.cat(states), cu_seqlens.to(model.device))
            self.metrics.prompt_tokens += ends[-1]
            for index, (job, share) in enumerate(pieces):
                end = ends[index]
                if job.prompt_logprobs is not None:
                    self._add_logprobs(job, hidden[0, end - share : end])
                job.done += share
                job.state = after if len(pieces) == 1 else after.select([index])
                if job.done in (job.cache_at, len(job.ids)):
                    job.logits = model.logits(hidden[:, end - 1])
                    context = self._context(job)
                    for other in self.scheduler.reading:
                        if other.behind is job and other.cache_at == job.done:
                            other.behind, other.cached, other.done = None, context, job.done
                            other.state, other.logits = context.state, context.logits
                    if job.prompt_logprobs is None and job.start is None:
                        self.cache.put(job.ids[: job.done], context)
        for job in [job for job in self.scheduler.reading if job.done == len(job.ids)]:
            self._start_rows(job)

    def _add_logprobs(self, job: _Job, hidden: Tensor) -> None:
        """Append the log-probabilities of the tokens that follow the hidden states [share, M] of ids[done:]."""
        if not job.logprobs:
            job.logprobs.append(None)
        following = job.ids[job.done + 1 : job.done + 1 + len(hidden)].tolist()
        if following:
            model, tokenizer = self.loaded.model, self.loaded.tokenizer
            num_top = job.prompt_logprobs or 0
            scores = score_tokens(
                model, hidden[: len(following)], torch.tensor(following), None, num_top, tokenizer.vocab_size
            )
            lists = (part.tolist() for part in (scores.logprobs, scores.top, scores.top_ids))
            for id, *logprobs in zip(following, *lists, strict=True):
                job.logprobs.append(token_logprob(tokenizer, id, *logprobs))

    def _context(self, job: _Job) -> Context:
        cached = job.cached.num_tokens if job.cached is not None else 0
        assert job.state is not None
        return after_reading(job.ids[cached : job.done], job.cached or job.start, job.state, job.logits)

    def _start_rows(self, job: _Job) -> None:
        context = self._context(job)
        cached = job.cached.num_tokens if job.cached is not None else 0
        self.metrics.cached_tokens += cached
        before = job.start.num_tokens if job.start is not None else 0
        self.metrics.state_tokens += before
        num_tokens, logprobs = before + len(job.ids), job.logprobs if job.prompt_logprobs is not None else None
        kept = context.to("cpu") if job.keep_context else None
        times = job.started - job.submitted, time.monotonic() - job.started
        events: list[Event] = [PromptRead(job.index, num_tokens, before + cached, *times, logprobs, kept)]
        samples: list[_Sample] = []
        for row in start_rows(self.loaded.tokenizer, job.index, job.params, num_tokens, context.tail, job.ids):
            if job.params.max_tokens == 0:
                row.reason = "length"
                events.append(row.result())
                self.metrics.finished["length"] += 1
            else:
                samples.append(_Sample(job, row, Parked(context)))
        job.state = job.logits = job.cached = job.start = None
        with self._wake:
            self.scheduler.has_read(job, samples)
        if not samples:
            self.metrics.request_s.observe(time.monotonic() - job.submitted)
        job.request.deliver(events)

    def _decode(self) -> None:
        now = time.monotonic()
        by_request: dict[Ticket, list[Event]] = {}
        failed: set[_Job] = set()
        decoded = self.slots.decode(self._ends)
        with self._wake:
            for row, pieces in decoded:
                sample = self._samples[row]
                job = sample.job
                events = by_request.setdefault(job.request, [])
                if isinstance(pieces, RunError):
                    del self._samples[row]
                    self.metrics.failed += 1
                    failed.add(job)
                    events.append(Failed(pieces))
                    continue
                self.scheduler.decoded(sample, len(pieces))
                self.metrics.generated_tokens += len(pieces)
                if job.first_token is None:
                    job.first_token = time.monotonic()
                    self.metrics.first_token_s.observe(job.first_token - job.submitted)
                events += pieces
                if row.reason:
                    del self._samples[row]
                    events.append(row.result())
                    self.metrics.finished[row.reason] += 1
                    if self.scheduler.ended(sample):
                        self.metrics.request_s.observe(time.monotonic() - job.submitted)
            for job in failed:
                # Its other samples end, too.
                self._drop(job)
        self.metrics.step_s.observe(time.monotonic() - now)
        for ticket, events in by_request.items():
            ticket.deliver(events)

    def _fail_all(self, error: UserError) -> None:
        with self._wake:
            jobs = self.scheduler.jobs
            self._num_cut = self.scheduler.num_requests
            for job in jobs:
                self.scheduler.remove(job)
        self._samples.clear()
        self.slots.rows.clear()
        for ticket in {job.request for job in jobs}:
            ticket.deliver([Failed(error)])
