"""Ragged batches as one packed row, so that padding never enters a state.

tokens, cu_seqlens = pack([[5, 6, 7], [8]])             # [1, total], [N + 1], both on the CPU
hidden, state = model.hidden(tokens, state, cu_seqlens)
hidden = unpack_padded(hidden, cu_seqlens, length=3)    # [N, 3, M]
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pack(sequences: Sequence[Sequence[int] | np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate token ids, one sequence or more: tokens [1, total] int64 and cu_seqlens [N + 1] int32, on the CPU.

    Sequence i is tokens[0, cu_seqlens[i] : cu_seqlens[i + 1]].
    """
    tokens = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.from_numpy(tokens)[None], F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpack_padded(packed: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, total, ...] → [B, length, ...], zero where a row is shorter."""
    lengths = cu_seqlens.diff()
    keep = torch.arange(length, device=packed.device) < lengths[:, None]
    rows = packed.new_zeros(len(lengths), length, *packed.shape[2:])
    rows[keep] = packed[0]
    return rows


def packed_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of `total` packed tokens: the index of its sequence and its offset in that sequence, both [total] int64."""
    index = torch.arange(total, device=cu_seqlens.device)
    # right=True skips sequences of length zero.
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous().long(), index, right=True)
    return sequence, index - cu_seqlens.long()[sequence]
