"""A server's life: it runs until a signal, then refuses what is new, lets running requests end, and cuts the rest.

    signals = catch_signals()
    run_until_signal([engine], uvicorn.Server(config), listening_socket, 30, signals)      # raises Terminated

Until the last running request has ended, new ones and /health are answered with 503, so that a load balancer notices. A
request that is cut gets an error like any other: a stream an event, a plain request a 503.
"""

import atexit
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from tnllm.errors import RunError, Terminated
from tnllm.progress import log
from tnllm.serving.engine import Engine

if TYPE_CHECKING:
    import uvicorn

# The number of a signal, or None when a thread has ended.
Signals: TypeAlias = "queue.SimpleQueue[int | None]"
# For the last bytes to clients that read slowly, and for requests that are still being sent.
FLUSH_SECONDS = 3


def catch_signals() -> Signals:
    """From here on SIGTERM and Ctrl-C are for `run_until_signal`. Handlers that raise would interrupt whatever runs."""
    happened: Signals = queue.SimpleQueue()
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda number, frame: happened.put(number))
    return happened


def run_until_signal(
    engines: Sequence[Engine], server: "uvicorn.Server", listening: socket.socket, drain_s: float, happened: Signals
) -> NoReturn:
    """Serve on `listening` until SIGTERM or Ctrl-C; a second one cuts what is still running.

    Raises Terminated, whose message counts what was finished and cut; its exit code is 143, after Ctrl-C 130. Raises
    RunError if the server ended by itself.
    """

    def start(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            work()
            happened.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    for engine in engines:
        engine.start()
    # uvicorn's own handling of signals would close the listening socket at once; beside the main thread it has none.
    http = start(lambda: server.run(sockets=[listening]))
    by = happened.get()
    running = sum([engine.drain() for engine in engines])
    if running:
        log(
            f"stopping: running requests ({running}) have {drain_s:g} s, or until a second signal, to end; new ones get 503"
        )
    end = time.monotonic() + drain_s
    start(lambda: [engine.stop(timeout_s=max(0.0, end - time.monotonic())) for engine in engines])
    happened.get()
    cut = sum([engine.stop(finish=False) for engine in engines])
    server.should_exit = True
    http.join()
    if by is None:
        raise RunError("the HTTP server ended by itself; its log says why")
    outcome = f"; running requests: {running - cut} finished, {cut} cut" if running else ""
    ended = Terminated(f"stopped by {'Ctrl-C' if by == signal.SIGINT else 'SIGTERM'}{outcome}")
    ended.exit_code = 128 + by
    # A thread may still be in the tokenizer's C++ code, in which the interpreter's own end would abort it.
    atexit.register(os._exit, ended.exit_code)
    raise ended
