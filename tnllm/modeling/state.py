"""The recurrent state of a model: a value that is passed in and returned.

    state = model.init_state(batch=2)
    logits, state = model(tokens, state)
    fork = state.select([0, 0, 0])        # three continuations of row 0

A TransNormer layer's state is [B, H, D, E] fp32, of constant size whatever the length. The softmax baseline's is its
key-value cache [2, B, T, H, d]; `position` says how many of the T slots of each row are filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class State:
    """One tensor per layer, and the number of tokens each row has seen ([B] int64)."""

    layers: list[Tensor]
    position: Tensor
    rows_dim: int = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' states."""
        return sum(layer.nbytes for layer in self.layers)

    def clone(self) -> "State":
        """A deep copy."""
        return State([layer.clone() for layer in self.layers], self.position.clone(), self.rows_dim)

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """Rows by index, in any order and with repeats: forks, beams and reordering."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.position.device)
        layers = [layer.index_select(self.rows_dim, index.to(layer.device)) for layer in self.layers]
        return State(layers, self.position.index_select(0, index), self.rows_dim)

    def write(self, row: int, source: "State", source_row: int = 0) -> None:
        """Copy a row of another state into this one, in place; a cache grows to hold it."""
        for index, values in enumerate(source.layers):
            values = values.select(self.rows_dim, source_row)
            if self.rows_dim == 1 and self.layers[index].shape[2] < values.shape[1]:
                missing = values.shape[1] - self.layers[index].shape[2]
                self.layers[index] = torch.nn.functional.pad(self.layers[index], (0, 0, 0, 0, 0, missing))
            # Without its rows a cache is [2, T, H, d], of which the first slots are written; any other is of equal size.
            self.layers[index].select(self.rows_dim, row)[:, : values.shape[1]].copy_(values)
        self.position[row] = source.position[source_row]

    def to(self, device: torch.device | str) -> "State":
        """The same state on another device."""
        return State([layer.to(device) for layer in self.layers], self.position.to(device), self.rows_dim)

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """Concatenate the rows of several states of one model."""
        dim = states[0].rows_dim
        join = torch.cat if dim == 0 else _cat_caches
        columns = [join(layers) for layers in zip(*(state.layers for state in states), strict=True)]
        return State(columns, torch.cat([state.position for state in states]), dim)


def _cat_caches(caches: Sequence[Tensor]) -> Tensor:
    """Concatenate [2, B, T, H, d] caches of different capacities along B."""
    capacity = max(cache.shape[2] for cache in caches)
    padded = [torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, capacity - cache.shape[2])) for cache in caches]
    return torch.cat(padded, dim=1)
