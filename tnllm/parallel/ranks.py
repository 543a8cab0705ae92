"""What the training loop asks of the other ranks, and what one process answers itself.

    ranks = OneRank() or ManyRanks(mesh)
    labels = ranks.start_step(labels, signals)     # of all ranks; None where a signal reached any of them
    loss = ranks.sum_loss(loss)

The loop is written once, against these few questions; with one process every answer is what it was given.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.parallel.mesh import Mesh

T = TypeVar("T")


class Signals(Protocol):
    """What a signal handler noted: `seen` by this process, `stop` once the run acts on it."""

    seen: int | None
    stop: int | None


class SharedError(UserError):
    """Every rank raises the same error; rank 0 says it, the others leave in silence with its exit code."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


class OneRank:
    """A run of one process."""

    size, main, data_rank, data_size = 1, True, 0, 1

    def start_step(self, labels: int, signals: Signals) -> int | None:
        """Labels of the step on all ranks; None where the run is to stop instead."""
        return labels

    def sum_loss(self, loss: Tensor) -> Tensor:
        """The loss of all ranks."""
        return loss

    def sum_counts(self, loss: float, labels: int, num_bytes: int) -> tuple[float, int, int]:
        """Loss, labels and bytes of all ranks' rows."""
        return loss, labels, num_bytes

    def smallest(self, value: float) -> float:
        """The smallest of all ranks' values."""
        return value

    def spread(self, value: float) -> list[float]:
        """Every rank's value, by rank."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0, then on the others; an error of rank 0 is raised by all."""
        return work()

    def share(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, given to all; an error is raised by all."""
        return work()

    def shared(self, error: RunError) -> UserError:
        """`error`, which every rank is about to raise, in the form this rank should."""
        return error


class ManyRanks(OneRank):
    """One of the ranks of `mesh`. What is asked travels on CPU, so that no step waits for a GPU."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.size, self.main = mesh.world_size, mesh.rank == 0
        self.data_rank, self.data_size = mesh.data_rank, mesh.data_size
        self._control = mesh.groups["control"]
        # Ranks that read the same rows count the same labels.
        self._copies = mesh.sizes["sequence"] * mesh.sizes["tensor"]

    def start_step(self, labels: int, signals: Signals) -> int | None:
        counts = torch.zeros(3, dtype=torch.int64)
        seen = signals.seen or 0
        counts[0], counts[1] = labels, seen
        counts[2] = int(seen > 0)
        dist.all_reduce(counts, group=self._control)
        total, numbers, count = counts.tolist()
        if count:
            # Of several signals, as on a terminal and from a launcher at once, any will do: all stop alike.
            signals.stop = seen or numbers // count
            return None
        return total // self._copies

    def sum_loss(self, loss: Tensor) -> Tensor:
        group = self.mesh.groups["batch"]
        if group.size() > 1:
            dist.all_reduce(loss, group=group)
        return loss

    def sum_counts(self, loss: float, labels: int, num_bytes: int) -> tuple[float, int, int]:
        # Each tensor rank has the whole loss of its tokens; each sequence rank the loss of its own.
        parts = torch.tensor([loss * self.mesh.sizes["sequence"], labels, num_bytes], dtype=torch.float64)
        dist.all_reduce(parts, group=self._control)
        total, labels, num_bytes = (parts / self._copies).tolist()
        return total, round(labels), round(num_bytes)

    def smallest(self, value: float) -> float:
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._control)
        return found.item()

    def spread(self, value: float) -> list[float]:
        everyone = torch.zeros(self.size, dtype=torch.float64)
        dist.all_gather(list(everyone.split(1)), torch.tensor([value], dtype=torch.float64), group=self._control)
        return everyone.tolist()

    def first(self, work: Callable[[], T]) -> T:
        result = self._rank_0(work)
        return result[0] if self.main else work()

    def share(self, work: Callable[[], T]) -> T:
        found = self._rank_0(work)
        dist.broadcast_object_list(found, src=0, group=self._control)
        return found[0]

    def _rank_0(self, work: Callable[[], T]) -> list[Any]:
        """[result] on rank 0, [None] elsewhere, once rank 0 is through; its UserError is raised by all."""
        result: list[Any] = [None]
        error: list[Any] = [None]
        raised: UserError | None = None
        if self.main:
            try:
                result = [work()]
            except UserError as found:
                raised, error = found, [(str(found), found.exit_code)]
        dist.broadcast_object_list(error, src=0, group=self._control)
        if raised is not None:
            raise raised
        if error[0] is not None:
            plain = UserError(error[0][0])
            plain.exit_code = error[0][1]
            raise SharedError(plain)
        return result

    def shared(self, error: RunError) -> UserError:
        return error if self.main else SharedError(error)
