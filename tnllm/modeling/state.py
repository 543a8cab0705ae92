"""The recurrent state of a model: a value that is passed in and returned.

    state = model.init_state(batch=2)
    logits, state = model(tokens, state)
    fork = state.select([0, 0, 0])        # three continuations of row 0

A linear layer's state is [B, H, D, E] fp32, of constant size whatever the length. A softmax layer's is its key-value cache
[B, 2, T, H, d]; `position` says how many of the T slots of each row are filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm.modeling.cache import grow, is_cache, resized


@dataclass
class State:
    """One tensor per layer, and the number of tokens each row has seen ([B] int64)."""

    layers: list[Tensor]
    position: Tensor

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def grows(self) -> bool:
        """Whether a layer keeps a cache."""
        return any(map(is_cache, self.layers))

    def clone(self) -> "State":
        return State([layer.clone() for layer in self.layers], self.position.clone())

    def reserve(self, rows: int | None = None) -> None:
        """Give every cache a free slot for the next token of the first `rows` rows (None: all)."""
        if self.grows:
            needed = int(self.position[:rows].max()) + 1
            self.layers = [grow(layer, needed) if is_cache(layer) else layer for layer in self.layers]

    def first(self, rows: int) -> "State":
        """The first rows, as a view."""
        return State([layer[:rows] for layer in self.layers], self.position[:rows])

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """Rows by index, in any order and with repeats: forks, beams and reordering. Caches are cut to the longest row."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.position.device)
        position = self.position.index_select(0, index)
        layers = self.layers
        if self.grows:
            longest = int(position.max())
            layers = [layer[:, :, :longest] if is_cache(layer) else layer for layer in layers]
        return State([layer.index_select(0, index.to(layer.device)) for layer in layers], position)

    def write(self, row: int, source: "State", source_row: int = 0) -> None:
        """Copy a row of another state into this one, in place; a cache grows to hold it."""
        for index, values in enumerate(source.layers):
            if is_cache(values):
                self.layers[index] = grow(self.layers[index], values.shape[2])
                # Slots that are not filled may hold what no number multiplies to zero.
                values = resized(values[source_row, None], self.layers[index].shape[2])[0]
            else:
                values = values[source_row]
            self.layers[index][row].copy_(values)
        self.position[row] = source.position[source_row]

    def to(self, device: torch.device | str) -> "State":
        return State([layer.to(device) for layer in self.layers], self.position.to(device))

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """Concatenate the rows of several states of one model."""
        layers = []
        for parts in zip(*(state.layers for state in states), strict=True):
            if is_cache(parts[0]):
                capacity = max(part.shape[2] for part in parts)
                parts = tuple(resized(part, capacity) for part in parts)
            layers.append(torch.cat(parts))
        return State(layers, torch.cat([state.position for state in states]))
