"""A counter that worker processes add to and the parent displays: bytes of input read, documents.

counter = new_counter(context)      # in the parent, handed to each worker's `use_counter`
advance(4096, 1)                    # in a step; does nothing without a counter
"""

from multiprocessing.context import BaseContext
from typing import Any

_counter: Any = None


def new_counter(context: BaseContext) -> Any:
    """Shared [bytes, documents]."""
    return context.Array("q", 2)


def use_counter(counter: Any) -> None:
    """Count into `counter` from now on in this process; None: do not count."""
    global _counter
    _counter = counter


def advance(num_bytes: int, documents: int) -> None:
    if _counter is not None:
        with _counter.get_lock():
            _counter[0] += num_bytes
            _counter[1] += documents
