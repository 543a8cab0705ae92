"""Loss spikes: reported with their samples, and with train.spikes: skip refused before they change a weight.

    detector = SpikeDetector(state.recent_losses)
    spike = detector.check(step=812, loss=5.1)     # None, or a Spike
    guard = SpikeGuard(device)
    refused = guard(loss, norm)                    # before the update, on the device

A loss is a spike if it exceeds the median of the last steps by more than eight standard deviations, estimated by the median
absolute deviation. Eight, so that normally distributed noise never is one.
"""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

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


class SpikeGuard:
    """Decides before an update, without the host, whether its loss or gradient norm is a spike; alike on every rank.

    `window` [2, 128] fp32 holds the losses and norms of the last updates that were none, NaN where there is none yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.window = torch.full((2, _WINDOW), float("nan"), device=device)
        self.skipped = torch.zeros((), device=device)
        # A gradient norm varies more than a loss does.
        self._rise = torch.tensor([_MIN_RISE, 1.0], device=device)

    def to_lists(self) -> list[list[float]]:
        """The losses and the norms so far, for a checkpoint; waits for the device."""
        return [[value for value in row if value == value] for row in self.window.tolist()]

    def load(self, lists: list[list[float]]) -> None:
        for row, values in zip(self.window, lists, strict=False):
            row[len(row) - len(values) :] = torch.tensor(values)

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether this update is to be skipped, a boolean scalar; both are scalars that every rank has alike."""
        values = torch.stack([loss.detach().float(), norm.float()])
        usual = self.window.nanmedian(1).values
        sigma = _TO_SIGMA * (self.window - usual[:, None]).abs().nanmedian(1).values
        enough = self.window[0].isfinite().sum() >= _MIN_LOSSES
        finite = values.isfinite().all()
        spike = (values > usual + torch.maximum(_DEVIATIONS * sigma, self._rise * usual.abs())).any() & enough & finite
        shifted = torch.cat([self.window[:, 1:], values[:, None]], 1)
        self.window.copy_(torch.where(finite & ~spike, shifted, self.window))
        self.skipped = spike.float()
        return spike
