"""A request in the engine, seen from outside: its events, its end, and why it was refused.

ticket = engine.submit(ids, params)
for event in ticket:                     # PromptRead, then a Piece per token, then a Result; raises what went wrong
    ...
ticket.cancel()
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tnllm.errors import UserError
from tnllm.generation.context import Context
from tnllm.generation.samples import Piece, Result, TokenLogprob
from tnllm.serving.bodies import RequestError


class Busy(RequestError):
    """Too many requests wait, or the engine is about to stop. The request was not queued."""

    def __init__(self, message: str, retry_after_s: int, stopping: bool = False) -> None:
        kind, code = ("service_unavailable", "shutting_down") if stopping else ("rate_limit_error", "queue_full")
        headers = {"Retry-After": str(retry_after_s)}
        super().__init__(message, None, code, 503 if stopping else 429, headers, kind)


class TooLong(UserError):
    """More tokens than the engine or the model takes."""


@dataclass(frozen=True)
class PromptRead:
    """The first event of a prompt: it was read."""

    index: int  # of the prompt
    prompt_tokens: int
    cached_tokens: int  # of these, not read now: found in the prefix cache, or in the context that it follows
    queue_s: float  # from submission to the start of reading
    read_s: float  # from there to the end
    logprobs: list[TokenLogprob | None] | None  # of each prompt token, if asked for; the first has none
    context: Context | None = None  # after the prompt, on the host, if asked for


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed or was cancelled."""

    error: UserError


Event = PromptRead | Piece | Result | Failed


class Ticket:
    """A submitted request. Iterate over its events, or pass `submit` a function that receives them."""

    def __init__(self, samples: int, deliver: Callable[[list[Event]], None] | None) -> None:
        """samples: of all its prompts together."""
        self._samples = samples
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.deliver = deliver or self._events.put
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Release the request's slots at the next step. Does nothing if it has ended."""
        self.cancelled.set()

    def __iter__(self) -> Iterator[PromptRead | Piece | Result]:
        results = 0
        while results < self._samples:
            for event in self._events.get():
                if isinstance(event, Failed):
                    raise event.error
                results += isinstance(event, Result)
                yield event
