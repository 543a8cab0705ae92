"""The recurrent state of a model in transformers: what `past_key_values` is.

state = model(input_ids, use_cache=True).past_key_values
model(more_ids, past_key_values=state)                  # reads it, and updates it in place
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from tnllm.modeling.cache import is_cache


class TnllmState:
    """Recurrent state of each layer, [B, H, D, E] fp32, or key-value cache [B, 2, length, H, d] of a softmax layer.

    A forward pass updates it in place. `length` is the number of columns read, padding included; `position` [B] the number
    of tokens of each row; `visible` [B, length] bool, in models with caches, the columns that the next token attends to.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers: list[Tensor], position: Tensor, length: int = 0, visible: Tensor | None = None) -> None:
        self.layers, self.position, self.length, self.visible = layers, position, length, visible

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether its size does not depend on the length."""
        return [not is_cache(layer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, padding included."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Largest number of columns: -1, there is no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.layers = [layer.index_select(0, beam_idx.to(layer.device)) for layer in self.layers]
        self.position = self.position.index_select(0, beam_idx.to(self.position.device))
        if self.visible is not None:
            self.visible = self.visible.index_select(0, beam_idx.to(self.visible.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        rows = torch.arange(self.position.shape[0], device=self.position.device).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget what was read."""
        self.layers = [torch.zeros_like(layer[:, :, :0] if is_cache(layer) else layer) for layer in self.layers]
        self.position, self.length = torch.zeros_like(self.position), 0
        self.visible = None if self.visible is None else self.visible[:, :0]

    def crop(self, max_length: int) -> None:
        """Raises ValueError: earlier states are not kept."""
        raise ValueError("a recurrent state cannot be cropped to an earlier token; assisted generation is not possible")

    def check(self, batch: int, columns: int, cache_position: Tensor | None) -> None:
        """Raise ValueError if it is of another batch, or if `cache_position` [T] does not continue it."""
        if self.position.shape[0] != batch:
            raise ValueError(f"past_key_values is of {self.position.shape[0]} rows, the input has {batch}")
        if cache_position is None or torch.compiler.is_compiling():
            return
        wanted = list(range(self.length, self.length + columns))
        if cache_position.tolist() != wanted:
            raise ValueError(
                f"cache_position must be {wanted[0]} to {wanted[-1]}: past_key_values has read {self.length} columns"
            )


def own_state(past_key_values: Any, cache: Any) -> TnllmState | None:
    """The state, under either of its two names. Raises ValueError for two, and for a cache of another class."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; give one")
    state = cache if past_key_values is None else past_key_values
    if state is not None and not isinstance(state, TnllmState):
        raise ValueError(
            f"past_key_values is a {type(state).__name__}, but this model has a recurrent state; pass the TnllmState that "
            "its own forward pass returned, or leave it out"
        )
    return state


def _unflatten(values: Iterable[Any], length: Any) -> TnllmState:
    layers, position, visible = values
    return TnllmState(layers, position, length, visible)


_pytree.register_pytree_node(
    TnllmState,
    lambda state: ([state.layers, state.position, state.visible], state.length),
    _unflatten,
)
