"""Loss spikes: detected and reported with their samples; what to do about them is left to a person.

    detector = SpikeDetector(state.recent_losses)
    spike = detector.check(step=812, loss=5.1)     # None, or a Spike

A loss is a spike if it exceeds the median of the last steps by more than eight standard deviations, estimated by the median
absolute deviation. Eight, so that normally distributed noise never is one.
"""

from dataclasses import dataclass
from statistics import median

_WINDOW, _MIN_LOSSES = 128, 32
_DEVIATIONS = 8.0
# 1 / 0.6745: from the median absolute deviation of a normal variable to its standard deviation.
_TO_SIGMA = 1.4826
# An overfitted run has near-zero loss variance, where any change is many deviations.
_MIN_RISE = 0.05


@dataclass(frozen=True)
class Spike:
    """A loss far above `usual`, the median of the steps before it."""

    step: int
    loss: float
    usual: float


class SpikeDetector:
    """Keeps the last 128 losses in `recent`, a list of the caller's; reports nothing before it has 32."""

    def __init__(self, recent: list[float] | None = None) -> None:
        self._last = [] if recent is None else recent

    def check(self, step: int, loss: float) -> Spike | None:
        """The spike that `loss` (finite) is, or None. A spike is not kept, so that a second one is reported too."""
        if len(self._last) >= _MIN_LOSSES:
            usual = median(self._last)
            sigma = _TO_SIGMA * median(abs(value - usual) for value in self._last)
            if loss > usual + max(_DEVIATIONS * sigma, _MIN_RISE * abs(usual)):
                return Spike(step, loss, usual)
        self._last.append(loss)
        del self._last[:-_WINDOW]
        return None
