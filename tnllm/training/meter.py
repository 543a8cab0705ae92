"""What is watched while a run trains: the time of its steps, and updates that are not finite.

timer = StepTimer()
timer.add(update)                                # after each update
timer.steps_per_s()
policy = NonFinitePolicy("skip", file, ranks)
policy.refused(update, last_sample, loss, norm, state)     # raises if the run must stop
"""

import json
import time
from pathlib import Path
from typing import Any

from tnllm.errors import RunError
from tnllm.parallel.ranks import SingleProcess
from tnllm.training.checkpoint import TrainState
from tnllm.training.trainer import Update

# Under the policy `skip`, this many refused updates in a row end the run: it will not recover by itself.
_MAX_SKIPS_IN_A_ROW = 20


class StepTimer:
    """Steps and waits since the last `restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start again, after a row or after work that is not a training step."""
        self._started, self._steps, self.data_wait_s, self.rank_wait_s = time.perf_counter(), 0, 0.0, 0.0

    def add(self, update: Update) -> None:
        self._steps += 1
        self.data_wait_s += update.data_wait_s
        self.rank_wait_s += update.rank_wait_s

    def steps_per_s(self) -> float:
        return self._steps / (time.perf_counter() - self._started)

    def waits(self, ranks: SingleProcess) -> dict[str, float]:
        """For metrics.jsonl: of several ranks also the slowest one, and the longest time another one waited for it."""
        waits = {"data_wait_s": self.data_wait_s}
        if ranks.size == 1:
            return waits
        for_ranks = ranks.all_gather(self.rank_wait_s)
        return waits | {"rank_wait_s": max(for_ranks), "straggler": for_ranks.index(min(for_ranks))}


class NonFinitePolicy:
    """train.nonfinite: what a refused update leads to. Each is a line of `file`, with its loss and global samples."""

    def __init__(self, policy: str, file: Path, ranks: SingleProcess) -> None:
        self.policy, self.file, self.ranks = policy, file, ranks

    def refused(
        self, update: Update, last_sample: int, loss: float, norm: float, state: TrainState, spike: bool = False
    ) -> None:
        """Count the refused update in `state`: not finite, or a `spike`. Raises RunError if the run must stop."""
        samples = [update.first_sample, last_sample]
        report: dict[str, Any] = {"step": update.step, "samples": samples, "loss": str(loss), "grad_norm": str(norm)}
        report |= {"spike": True} if spike else {}
        if self.ranks.main:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
        state.skipped += 1
        state.skipped_in_a_row += 1
        advice = None
        if self.policy == "stop" and not spike:
            advice = "the update was refused. Lower optimizer.learning_rate or set train.nonfinite=skip"
        elif state.skipped_in_a_row >= _MAX_SKIPS_IN_A_ROW:
            advice = f"{state.skipped_in_a_row} updates in a row were refused, so the run stops"
        if advice is not None:
            what = f"step {update.step}: loss {loss}, gradient norm {norm}"
            error = RunError(f"{what} (global samples {update.first_sample} to {last_sample}); {advice}")
            raise self.ranks.as_shared_error(error)
