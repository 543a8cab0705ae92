"""Packed rows: what a ragged batch looks like, whatever holds its token ids."""

import numpy as np
import pytest
import torch

from tnllm.modeling.packing import pack, packed_index


@pytest.mark.parametrize(
    "as_type", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32), np.array]
)
def test_pack_concatenates_and_counts(as_type):
    tokens, cu_seqlens = pack([as_type(ids) for ids in ([7, 8, 9], [100_000], [1, 2])])
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[7, 8, 9, 100_000, 1, 2]]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 4, 6]
    sequence, index = packed_index(cu_seqlens, 6)
    assert sequence.tolist() == [0, 0, 0, 1, 2, 2] and index.tolist() == [0, 1, 2, 0, 0, 1]


def test_pack_keeps_empty_sequences_and_does_not_change_with_its_input():
    ids = np.array([4, 5], dtype=np.int64)
    tokens, cu_seqlens = pack([[], ids, []])
    ids[:] = 0
    assert tokens.tolist() == [[4, 5]] and cu_seqlens.tolist() == [0, 0, 2, 2]
