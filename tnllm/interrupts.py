"""Ctrl-C ends a command with one line and exit code 130, whenever it comes.

    leave_at_once()             # the first thing a process does: imports are no place to raise in
    with raised():              # around the work: KeyboardInterrupt, so that what was begun is finished or undone
        for step in range(10):
            check()             # raises what was lost on the way
    handled()                   # in an `except KeyboardInterrupt` after which the work continues

Python drops an exception that is raised in a finaliser, a weak reference's callback or a C callback, and libraries catch
more than they should. So Ctrl-C is remembered until it was `handled`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_CODE = 130
LINE = "stopped by Ctrl-C"
# Until a dropped exception is raised once more: longer than most callbacks run.
_AGAIN_S = 0.05
_pending = 0


def leave_at_once() -> None:
    """From here on Ctrl-C ends the process. Does nothing in worker processes and where Ctrl-C is ignored or handled."""
    # A worker imports the module that was started.
    workers = sys.modules.get("multiprocessing.process")
    is_worker = workers is not None and workers.parent_process() is not None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not is_worker:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, f"tnllm: {LINE}\n".encode())
    os._exit(EXIT_CODE)


@contextmanager
def raised() -> Iterator[None]:
    """In the block Ctrl-C raises KeyboardInterrupt, again if Python dropped it, and at the latest at the block's end."""
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    is_main = threading.current_thread() is threading.main_thread()
    if before not in (_leave, signal.default_int_handler) or not is_main:
        yield
        return
    over = threading.Event()

    def again(seen: int) -> None:
        # Not if there was another one since: it must not interrupt the clearing up.
        if seen == _pending and not over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def dropped(error: Any) -> None:
        if not issubclass(error.exc_type, KeyboardInterrupt):
            hook(error)
            return
        timer = threading.Timer(_AGAIN_S, again, [_pending])
        timer.daemon = True
        timer.start()

    handled()
    sys.unraisablehook = dropped
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
        check()
    except BaseException as error:
        # Where Ctrl-C met an import or foreign code, that failed in its own way.
        if _pending and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
        # What runs later in this process, as in a notebook, was not interrupted.
        handled()


def _raise(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending += 1
    raise KeyboardInterrupt


def handled() -> None:
    """Ctrl-C did what it was for, and the work continues."""
    global _pending
    _pending = 0


def check() -> None:
    """Raise KeyboardInterrupt if it was raised before and did not arrive. For every step of long work."""
    # While it is on its way, clearing up may take steps too.
    if _pending and sys.exc_info()[1] is None and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
