"""Losses that jump: noticed, named by their samples, left to a person to judge.

    watch = SpikeDetector()
    spike = watch.check(step=812, loss=5.1)     # None, or what it jumped from

A loss is a spike where it lies above the median of the last steps by more than eight times their usual deviation from it
(the median one, scaled to a standard deviation): eight, so that noise of a normal kind is never one.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW, _ENOUGH = 128, 32
_DEVIATIONS = 8.0
# 1 / 0.6745: the median absolute deviation of a normal variable as its standard deviation.
_TO_SIGMA = 1.4826
# A run that has learned its data by heart has losses without noise, where every change is many deviations.
_LEAST_RISE = 0.05


@dataclass(frozen=True)
class Spike:
    """A loss far above the `usual` one (the median of the steps before it)."""

    step: int
    loss: float
    usual: float


class SpikeDetector:
    """Remembers the last losses; needs 32 before it judges."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)

    def check(self, step: int, loss: float) -> Spike | None:
        """Whether `loss` (finite) is a spike; a spike is not remembered, so that a second one is noticed too."""
        if len(self._last) >= _ENOUGH:
            usual = median(self._last)
            sigma = _TO_SIGMA * median(abs(value - usual) for value in self._last)
            if loss > usual + max(_DEVIATIONS * sigma, _LEAST_RISE * abs(usual)):
                return Spike(step, loss, usual)
        self._last.append(loss)
        return None
