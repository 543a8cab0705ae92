"""Coordination between ranks, behind one interface that the training loop uses with one process and with many.

    ranks = SingleProcess() or Distributed(mesh)
    labels = ranks.start_step(labels, signals)     # summed over ranks; None if any rank received a stop signal
    loss = ranks.sum_loss(loss)

With one process every method returns what it was given.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.parallel.mesh import Mesh

T = TypeVar("T")


class Signals(Protocol):
    """Signal numbers: `seen`, received by this process; `stop`, the one the run acts on."""

    seen: int | None
    stop: int | None


class SharedError(UserError):
    """An error that every rank raises. Rank 0 prints it, the others exit silently with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SingleProcess:
    """A run of one process."""

    size, rank, main, data_rank, data_size = 1, 0, True, 0, 1

    def start_step(self, labels: int, signals: Signals) -> int | None:
        """Labels of the step summed over ranks; None if the run must stop instead."""
        return labels

    def sum_loss(self, loss: Tensor) -> Tensor:
        """The loss summed over ranks."""
        return loss

    def sum_counts(self, loss: float, labels: int, num_bytes: int) -> tuple[float, int, int]:
        """Loss, labels and bytes summed over the rows of all ranks."""
        return loss, labels, num_bytes

    def all_reduce_min(self, value: float) -> float:
        """The minimum over ranks."""
        return value

    def all_gather(self, value: float) -> list[float]:
        """Every rank's value, by rank."""
        return [value]

    def gather_in_background(self, value: T) -> list[T]:
        """Every rank's value, by rank; for a thread beside the training loop, and slow ranks get an hour."""
        return [value]

    def main_first(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0, then on the others; a UserError of rank 0 is raised on every rank."""
        return work()

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """The result of `work()` on rank 0; its UserError is raised on every rank."""
        return work()

    def as_shared_error(self, error: RunError) -> UserError:
        """What this rank raises for `error`, which occurred on every rank."""
        return error


class Distributed(SingleProcess):
    """One rank of `mesh`. Control messages travel between CPUs, so that no step waits for a GPU."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.size, self.rank, self.main = math.prod(mesh.sizes.values()), mesh.rank, mesh.rank == 0
        self.data_rank, self.data_size = mesh.data_rank, mesh.data_size
        self._control = mesh.groups["control"]
        # Ranks that read the same rows count the same labels.
        self._copies = mesh.sizes["sequence"] * mesh.sizes["tensor"]

    def start_step(self, labels: int, signals: Signals) -> int | None:
        seen = signals.seen or 0
        counts = torch.tensor([labels, seen, int(seen > 0)])
        dist.all_reduce(counts, group=self._control)
        total, numbers, count = counts.tolist()
        if count:
            # Ranks may have received different signals (terminal and launcher at once); all of them stop the run.
            signals.stop = seen or numbers // count
            return None
        return total // self._copies

    def sum_loss(self, loss: Tensor) -> Tensor:
        group = self.mesh.groups["batch"]
        if group.size() > 1:
            dist.all_reduce(loss, group=group)
        return loss

    def sum_counts(self, loss: float, labels: int, num_bytes: int) -> tuple[float, int, int]:
        # Tensor ranks each have the full loss of their tokens; sequence ranks have that of their own slice.
        sums = torch.tensor([loss * self.mesh.sizes["sequence"], labels, num_bytes], dtype=torch.float64)
        dist.all_reduce(sums, group=self._control)
        total, labels, num_bytes = (sums / self._copies).tolist()
        return total, round(labels), round(num_bytes)

    def all_reduce_min(self, value: float) -> float:
        minimum = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(minimum, op=dist.ReduceOp.MIN, group=self._control)
        return minimum.item()

    def all_gather(self, value: float) -> list[float]:
        values = torch.zeros(self.size, dtype=torch.float64)
        dist.all_gather(list(values.split(1)), torch.tensor([value], dtype=torch.float64), group=self._control)
        return values.tolist()

    def gather_in_background(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.mesh.groups["files"])
        return values

    def main_first(self, work: Callable[[], T]) -> T:
        result = self._run_on_main(work)
        return result[0] if self.main else work()

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        result = self._run_on_main(work)
        dist.broadcast_object_list(result, src=0, group=self._control)
        return result[0]

    def _run_on_main(self, work: Callable[[], T]) -> list[Any]:
        """Returns [result] on rank 0 and [None] elsewhere, once rank 0 is done; its UserError is raised on all."""
        status: list[Any] = [None]
        try:
            result: list[Any] = [work() if self.main else None]
        except UserError as error:
            dist.broadcast_object_list([(str(error), error.exit_code)], src=0, group=self._control)
            raise
        dist.broadcast_object_list(status, src=0, group=self._control)
        if status[0] is not None:
            raise SharedError(*status[0])
        return result

    def as_shared_error(self, error: RunError) -> UserError:
        return error if self.main else SharedError(str(error), error.exit_code)
