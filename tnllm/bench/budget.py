"""How long a benchmark may take: every measurement is forecast from smaller ones, and Ctrl-C loses none that is done.

    budget = Budget(minutes=1, log=log)
    with budget:                                        # Ctrl-C ends the block quietly; `budget.interrupted` says so
        for number, provider in enumerate(providers):
            budget.part(len(providers) - number)        # what is left, divided among the providers that are left
            seconds = budget.forecast(provider, work)   # of one call; None where nothing of it was timed
            if budget.allows("sdpa at 65536", 7 * seconds):
                budget.learn(provider, work, measured_seconds)

`work` is any measure that time grows with in proportion: FLOPs, bytes or tokens.
"""

import math
import time
from collections.abc import Callable, Hashable
from types import TracebackType

from tnllm.files import format_duration


class Budget:
    """Minutes for all measurements, counted from now on."""

    def __init__(self, minutes: float = math.inf, log: Callable[[str], None] = lambda text: None) -> None:
        self.minutes, self.log = minutes, log
        self.interrupted = False
        self._ends = self._part_ends = time.monotonic() + 60 * minutes
        self._seen: dict[Hashable, dict[float, float]] = {}

    def __enter__(self) -> "Budget":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self.interrupted:
            self.log("stopped by Ctrl-C: what is done follows")
        return self.interrupted

    def close(self) -> None:
        """After everything was written: raise the KeyboardInterrupt that ended the measurements, if one did."""
        if self.interrupted:
            raise KeyboardInterrupt

    def part(self, parts_left: int) -> None:
        """Begin one of `parts_left` parts: it may use that share of the time left. What it leaves goes to the others.

        Checks come first and take the time they take: an eighth of all minutes is left for a part's measurements then.
        """
        now = time.monotonic()
        self._part_ends = now + max((self._ends - now) / parts_left, 60 * self.minutes / 8)

    @property
    def left_s(self) -> float:
        """Seconds left for this part."""
        return max(0.0, self._part_ends - time.monotonic())

    def learn(self, key: Hashable, work: float, seconds: float) -> None:
        """A call of this work took so long."""
        self._seen.setdefault(key, {})[work] = seconds

    def nearest(self, key: Hashable, work: float) -> float | None:
        """The work, of those that were timed, from which `forecast` starts."""
        return min(self._seen.get(key, ()), key=lambda seen: abs(math.log(work / seen)), default=None)

    def forecast(self, key: Hashable, work: float) -> float | None:
        """Seconds of a call, in proportion to the nearest work that was timed; None if there is none."""
        near = self.nearest(key, work)
        return None if near is None else self._seen[key][near] * work / near

    def allows(self, name: str, seconds: float | None, at_least: float | None = None) -> bool:
        """Whether `name` fits what is left, in `seconds` or with fewer repetitions in `at_least`; logs the answer."""
        least, left = seconds if at_least is None else at_least, self.left_s
        if least is not None and least > left:
            self.log(f"not timed: {name}, {self.refusal(least)}")
            return False
        usual = "" if seconds is None else f", about {format_duration(min(seconds, left))}"
        self.log(f"timing {name}{usual}")
        return True

    def refusal(self, seconds: float) -> str:
        """Why something that takes `seconds` is not done."""
        left = format_duration(self.left_s)
        return f"about {format_duration(seconds)} where {left} is left (--max-minutes {self.minutes:g} raises it)"
