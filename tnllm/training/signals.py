"""Ctrl-C and SIGTERM during a run: stop after the current pass, save, exit with the right code."""

import os
import signal
from types import FrameType
from typing import Any

from tnllm.errors import Terminated

_STOPPING = b"\nstopping when the current pass is through and all is saved; Ctrl-C again stops at once\n"


class StopSignals:
    """While active, the first SIGINT or SIGTERM only sets `stop`; a second SIGINT stops at once.

    `shared`: this is one of several ranks. The signal then only sets `seen`; `stop` is set once all ranks agree.
    `max_time`: after so many seconds it acts as after a SIGALRM, which ends the process with code 0.
    """

    def __init__(self, shared: bool = False, max_time: float | None = None) -> None:
        self._max_time = max_time
        self.stop: int | None = None
        self.seen: int | None = None
        self._shared = shared
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if self._max_time else [])):
            self._before[number] = signal.signal(number, self._handle)
        if self._max_time:
            signal.setitimer(signal.ITIMER_REAL, self._max_time)
        return self

    def __exit__(self, *_: object) -> None:
        if self._max_time:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = number
        if not self._shared:
            self.stop = number
        # Written to the descriptor: a handler may interrupt a print, and printing is not reentrant.
        os.write(2, _STOPPING)

    def leave(self, how_to_resume: str) -> None:
        """Raise KeyboardInterrupt or Terminated: exit code 130 or 143. After a SIGALRM return, so that it is 0."""
        if self.stop == signal.SIGALRM:
            return
        if self.stop == signal.SIGTERM:
            raise Terminated(f"stopped by SIGTERM; everything is saved, {how_to_resume}")
        raise KeyboardInterrupt
