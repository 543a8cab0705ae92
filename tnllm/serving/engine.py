"""Continuous batching: requests join and leave at every step, long prompts are read between steps.

    with Engine(ready, num_slots=32) as engine:
        ticket = engine.submit(ids, ready.params(max_tokens=50, seed=1))
        for event in ticket:                     # Piece, Result for each sample; raises what went wrong
            ...
        ticket.cancel()                          # from any thread, at any time

One thread owns model and tensors. Each turn it admits waiting requests, reads at most `prefill_tokens` of prompts (shared
evenly among those being read) and decodes a few tokens of every row: nobody waits for another's prompt or
text to end. A sample depends on its prompt, options and seed alone, so it is what `generate` gives.

Waiting requests are taken in turns over clients, and in order within a client. When `queue_size` requests wait, `submit`
raises Busy with the seconds after which to try again.
"""

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.context import Context, after_reading, weights_hash
from tnllm.generation.loading import Ready
from tnllm.generation.sampler import SamplingParams, log_probabilities
from tnllm.generation.samples import Piece, Result, Row, TokenLogprob, start_rows, token_logprob
from tnllm.modeling.packing import pack
from tnllm.modeling.state import State
from tnllm.serving.metrics import Metrics
from tnllm.serving.prefix_cache import PrefixCache
from tnllm.serving.slots import Slots

# Tokens of prompts read between two decoding steps: on a CPU about what some steps cost, so that running texts slow
# down but do not stand still; on a GPU enough to use it.
PREFILL_TOKENS = {"cpu": 128, "cuda": 2048}
# Fewer tokens of a prompt are not worth a place in a pass.
_MIN_SHARE = 16


class Busy(UserError):
    """Too many requests wait, or the engine is about to stop. Nothing was done."""

    def __init__(self, message: str, retry_after_s: int, stopping: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s, self.stopping = retry_after_s, stopping


@dataclass(frozen=True)
class PromptRead:
    """The first event of a request: its prompt was read."""

    prompt_tokens: int
    cached_tokens: int  # of them, found in the prefix cache
    logprobs: list[TokenLogprob | None] | None  # of each prompt token, if asked for; the first has none


@dataclass(frozen=True)
class Failed:
    """The last event of a request that went wrong or was cancelled."""

    error: UserError


Event = PromptRead | Piece | Result | Failed


class Ticket:
    """A submitted request. Iterate for its events, or give `submit` a function that takes them as they come."""

    def __init__(self, samples: int, deliver: Callable[[list[Event]], None] | None) -> None:
        self._samples = samples
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.deliver = deliver or self._events.put
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Free what the request holds, at the next step. Harmless when it has ended."""
        self.cancelled.set()

    def __iter__(self) -> Iterator[PromptRead | Piece | Result]:
        results = 0
        while results < self._samples:
            for event in self._events.get():
                if isinstance(event, Failed):
                    raise event.error
                results += isinstance(event, Result)
                yield event


@dataclass(eq=False)
class _Job:
    """A request from submission until its prompt is read; its rows go on alone."""

    ids: list[int]
    params: SamplingParams
    ticket: Ticket
    client: str
    prompt_logprobs: bool
    submitted: float
    before: Context | None = None  # read earlier, from the cache
    state: State | None = None  # after ids[:done]
    done: int = 0
    keep_at: int = 0  # where a beginning shared with an earlier prompt ends
    logits: Tensor | None = None  # [1, V] after the last token read
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    rows_left: int = 0
    first_token: float | None = None


class Engine:
    """Serves one model. Use as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        ready: Ready,
        *,
        num_slots: int = 32,
        queue_size: int = 512,
        prefill_tokens: int | None = None,
        cache_bytes: int = 1 << 28,
        max_prompt_tokens: int = 1 << 20,
        max_new_tokens: int = 1 << 16,
    ) -> None:
        """num_slots: texts decoded together. queue_size: requests that may wait for one. cache_bytes: of the prefix
        cache; 0 turns it off. The last two bound a single request. Raises UserError for a model that cannot be served.
        """
        model = ready.model
        self.ready, self.num_slots, self.queue_size = ready, num_slots, queue_size
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS[model.device.type]
        ready.tokenizer.check_vocabulary(model.config.vocab_size)
        self.slots = Slots(model, ready.tokenizer, num_slots)
        self.weights = weights_hash(model)
        self.cache = PrefixCache(self.weights, cache_bytes)
        self.metrics = Metrics(self)
        self._ends = frozenset(ready.eos_ids)
        self._wake = threading.Condition()
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # by client, the next one first
        self.num_waiting = 0
        self._reading: list[_Job] = []
        self._to_join: deque[tuple[Row, Context]] = deque()
        self._jobs: dict[int, _Job] = {}  # by id(row)
        self._stopping = self._abandon = False
        self._thread = threading.Thread(target=self._run, name="tnllm-engine", daemon=True)

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(finish=error[0] is None)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def stop(self, finish: bool = True, timeout_s: float | None = None) -> None:
        """Drain and wait; with finish=False, or after `timeout_s`, what is left is cancelled."""
        self.drain()
        if finish:
            self._thread.join(timeout_s)
        with self._wake:
            self._abandon = True
            self._wake.notify()
        self._thread.join()

    @property
    def num_active(self) -> int:
        """Requests and samples that are being read or decoded."""
        return len(self._reading) + len(self._to_join) + len(self.slots.rows)

    @property
    def stopping(self) -> bool:
        """Whether requests are refused for good."""
        return self._stopping or not self._thread.is_alive()

    def check(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raise UserError for a request this engine will not serve."""
        config = self.ready.model.config
        if not ids:
            raise UserError("the prompt is empty; give text, or the begin token to start from nothing")
        if len(ids) > self.max_prompt_tokens:
            raise UserError(f"the prompt has {len(ids)} tokens; this server takes at most {self.max_prompt_tokens}")
        if params.max_tokens > self.max_new_tokens:
            raise UserError(f"max_tokens is {params.max_tokens}; this server gives at most {self.max_new_tokens}")
        if not 0 <= min(ids) <= max(ids) < self.ready.tokenizer.vocab_size:
            bad = next(id for id in ids if not 0 <= id < self.ready.tokenizer.vocab_size)
            raise UserError(f"token id {bad} is outside the vocabulary of {self.ready.tokenizer.vocab_size}")
        if config.position == "ape" and len(ids) + params.max_tokens > config.max_position:
            raise UserError(
                f"prompt and max_tokens are {len(ids) + params.max_tokens} tokens; this model has learned "
                f"{config.max_position} positions"
            )

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        client: str = "",
        prompt_logprobs: bool = False,
        deliver: Callable[[list[Event]], None] | None = None,
    ) -> Ticket:
        """Queue a prompt, from any thread; `deliver` is called on the engine's with what came, in order.

        client: whose turn it is counted as. prompt_logprobs: also of each prompt token (params.logprobs says how many
        likeliest ones). Raises UserError for a bad request, Busy when it cannot wait here.
        """
        self.check(ids, params)
        ticket = Ticket(params.n, deliver)
        job = _Job(list(ids), params, ticket, client, prompt_logprobs, time.monotonic(), rows_left=params.n)
        with self._wake:
            if self.stopping:
                raise Busy("the server is shutting down; try another one", 10, stopping=True)
            if self.num_waiting >= self.queue_size:
                self.metrics.refused += 1
                raise Busy(
                    f"{self.num_waiting} requests are waiting, which is the most this server lets wait; try again later",
                    self.metrics.seconds_to_turn(),
                )
            self._waiting.setdefault(client, deque()).append(job)
            self.num_waiting += 1
            self._wake.notify()
        return ticket

    def _run(self) -> None:
        if self.ready.model.device.type == "cuda":
            torch.cuda.set_device(self.ready.model.device)
        try:
            self.slots.warm_up()
            while self._turn():
                pass
        except BaseException as error:
            # Nobody may wait for ever for a thread that is gone.
            with self._wake:
                self._stopping = True
            self._fail_all(RunError(f"the engine stopped: {error}"))
            raise

    def _turn(self) -> bool:
        """Admit, read, decode. False when there is nothing more to do for good."""
        with self._wake:
            while not (self._abandon or self.num_waiting or self.num_active):
                if self._stopping:
                    return False
                self._wake.wait()
        if self._abandon:
            self._fail_all(Busy("the server shut down before the text was finished", 10, stopping=True))
            return False
        self._drop_cancelled()
        self._admit()
        if self._reading:
            self._read_some()
        while self._to_join and self.slots.free:
            self.slots.join(*self._to_join.popleft())
        if self.slots.rows:
            self._decode()
        return True

    def _drop_cancelled(self) -> None:
        gone = RunError("the request was cancelled")
        dropped: list[_Job] = []
        with self._wake:
            for client, jobs in list(self._waiting.items()):
                dropped += [job for job in jobs if job.ticket.cancelled.is_set()]
                self._waiting[client] = deque(job for job in jobs if not job.ticket.cancelled.is_set())
                if not self._waiting[client]:
                    del self._waiting[client]
            self.num_waiting -= len(dropped)
        dropped += [job for job in self._reading if job.ticket.cancelled.is_set()]
        self._reading = [job for job in self._reading if not job.ticket.cancelled.is_set()]
        rows = [row for row, _ in self._to_join] + self.slots.rows
        for row in [row for row in rows if self._jobs[id(row)].ticket.cancelled.is_set()]:
            job = self._jobs[id(row)]
            self._drop_row(row)
            if job not in dropped:
                dropped.append(job)
        for job in dropped:
            self.metrics.cancelled += 1
            job.ticket.deliver([Failed(gone)])

    def _drop_row(self, row: Row) -> None:
        del self._jobs[id(row)]
        if any(row is other for other in self.slots.rows):
            self.slots.leave(row)
        else:
            self._to_join = deque(pair for pair in self._to_join if pair[0] is not row)

    def _admit(self) -> None:
        """Start to read the prompts of waiting requests, as long as slots will be free for them."""
        while not self._to_join and len(self._reading) < self.slots.free:
            with self._wake:
                if not self._waiting:
                    return
                client, jobs = next(iter(self._waiting.items()))
                job = jobs.popleft()
                # The next turn is another client's.
                del self._waiting[client]
                if jobs:
                    self._waiting[client] = jobs
                self.num_waiting -= 1
            self.metrics.queue_s.observe(time.monotonic() - job.submitted)
            if not job.prompt_logprobs:
                job.before = self.cache.longest(job.ids)
                job.keep_at = self.cache.branch(job.ids)
            if job.before is not None:
                job.done, job.logits = job.before.num_tokens, job.before.logits
            job.state = job.before.state if job.before is not None else self.ready.model.init_state(1)
            self._reading.append(job)

    def _shares(self) -> Iterator[tuple[_Job, int]]:
        """How many tokens of which prompt to read now: half of the room for the oldest, so that it ends; the rest
        shared by the others, shortest first, so that a short prompt does not wait for long ones."""
        # Beside many running texts more, or the last of many prompts would wait for as many slow steps.
        room = max(self._prefill_tokens, 2 * len(self.slots.rows))
        oldest, *others = self._reading
        others.sort(key=lambda job: len(job.ids) - job.done)
        for place, job in enumerate([oldest, *others]):
            if room <= 0:
                return
            most = max(_MIN_SHARE, room // 2 if place == 0 else room // (len(others) - place + 1))
            share = min(len(job.ids) - job.done, most if others else room)
            if job.done < job.keep_at < job.done + share:
                share = job.keep_at - job.done
            room -= share
            yield job, share

    @torch.no_grad()
    def _read_some(self) -> None:
        """One pass over pieces of the prompts that are being read, packed, so that padding never enters a state."""
        model = self.ready.model
        pieces = [(job, share) for job, share in self._shares() if share]
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
                if job.prompt_logprobs:
                    self._note_logprobs(job, hidden[0, end - share : end])
                job.done += share
                job.state = after if len(pieces) == 1 else after.select([index])
                if job.done in (job.keep_at, len(job.ids)):
                    job.logits = model.logits(hidden[:, end - 1])
                    context = self._context(job)
                    if not job.prompt_logprobs:
                        self.cache.put(job.ids[: job.done], context)
        for job in [job for job in self._reading if job.done == len(job.ids)]:
            self._reading.remove(job)
            self._start_rows(job)

    def _note_logprobs(self, job: _Job, hidden: Tensor) -> None:
        """Log-probabilities of the tokens after each of the hidden states [share, M] at ids[done:]."""
        if not job.logprobs:
            job.logprobs.append(None)
        following = job.ids[job.done + 1 : job.done + 1 + len(hidden)]
        if following:
            logits = self.ready.model.logits(hidden[: len(following)])
            logits[:, self.ready.tokenizer.vocab_size :] = -torch.inf
            num_top = job.params.logprobs or 0
            ids = torch.tensor(following, device=logits.device)
            chosen, top, top_ids = (part.tolist() for part in log_probabilities(logits, ids, num_top))
            for place, id in enumerate(following):
                job.logprobs.append(token_logprob(self.ready.tokenizer, id, chosen[place], top[place], top_ids[place]))

    def _context(self, job: _Job) -> Context:
        cached = job.before.num_tokens if job.before is not None else 0
        assert job.state is not None
        return after_reading(job.ids[cached : job.done], job.before, job.state, job.logits)

    def _start_rows(self, job: _Job) -> None:
        context = self._context(job)
        cached = job.before.num_tokens if job.before is not None else 0
        self.metrics.cached_tokens += cached
        events: list[Event] = [
            PromptRead(len(job.ids), cached, job.logprobs if job.prompt_logprobs else None),
        ]
        for row in start_rows(self.ready.tokenizer, 0, job.params, len(job.ids), context.tail):
            if job.params.max_tokens == 0:
                row.reason = "length"
                events.append(row.result())
                self._ended(job, "length")
            else:
                self._jobs[id(row)] = job
                self._to_join.append((row, context))
        job.state = job.logits = job.before = None
        job.ticket.deliver(events)

    def _decode(self) -> None:
        now = time.monotonic()
        by_job: dict[_Job, list[Event]] = {}
        for row, pieces in self.slots.decode(self._ends):
            job = self._jobs[id(row)]
            events = by_job.setdefault(job, [])
            if isinstance(pieces, RunError):
                del self._jobs[id(row)]
                self.metrics.failed += 1
                job.ticket.cancel()  # its other samples
                events.append(Failed(pieces))
                continue
            self.metrics.generated_tokens += len(pieces)
            if job.first_token is None:
                job.first_token = time.monotonic()
                self.metrics.first_token_s.observe(job.first_token - job.submitted)
            events += pieces
            if row.reason:
                del self._jobs[id(row)]
                events.append(row.result())
                self._ended(job, row.reason)
        self.metrics.step_s.observe(time.monotonic() - now)
        for job, events in by_job.items():
            job.ticket.deliver(events)

    def _ended(self, job: _Job, reason: str) -> None:
        self.metrics.finished[reason] += 1
        job.rows_left -= 1
        if not job.rows_left:
            self.metrics.request_s.observe(time.monotonic() - job.submitted)

    def _fail_all(self, error: UserError) -> None:
        with self._wake:
            jobs = {id(job): job for jobs in self._waiting.values() for job in jobs}
            self._waiting.clear()
            self.num_waiting = 0
        jobs |= {id(job): job for job in [*self._reading, *self._jobs.values()]}
        self._reading, self._jobs = [], {}
        self._to_join.clear()
        self.slots.rows.clear()
        for job in jobs.values():
            job.ticket.deliver([Failed(error)])
