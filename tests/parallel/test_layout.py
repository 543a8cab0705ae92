"""Shards of parameters and slices of batches: together they hold each element of the full ones once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnllm.parallel.layout import TENSOR_PLAN, Layout
from tnllm.parallel.sequence import shard_sequence

NAMES = [*(f"layers.3.{end}" for end in TENSOR_PLAN), "layers.0.token_norm.weight"]


@given(
    name=st.sampled_from(NAMES),
    unit=st.integers(1, 5),
    width=st.integers(1, 3),
    tensor=st.integers(1, 4),
    fsdp=st.integers(1, 7),
)
def test_the_shards_of_all_ranks_cover_the_parameter(name, unit, width, tensor, fsdp):
    shape = (12 * unit * tensor, width * tensor) if not name.endswith("norm.weight") else (12 * unit * tensor,)
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    covered = torch.zeros(shape, dtype=torch.int64)
    for tensor_rank in range(tensor):
        layout = Layout.of(name, shape, (tensor_rank, tensor))
        rows = []
        for fsdp_rank in range(fsdp):
            shard = layout.with_rows((fsdp_rank, fsdp))
            local = torch.full(shard.local_shape, -1)
            for mine, slices in shard.slices():
                local[mine] = full[slices]
                covered[slices] += 1
            assert (local >= 0).all()
            rows.append(local)
        # FSDP splits the tensor-parallel shard like torch.chunk, without regard to blocks.
        alone = torch.full(layout.shape, -1)
        for mine, slices in layout.slices():
            alone[mine] = full[slices]
        assert torch.equal(torch.cat(rows), alone)
    split = layout.dim is not None
    assert (covered == (1 if split else tensor)).all()


def test_heads_are_taken_from_each_of_q_k_v_u():
    layout = Layout.of("layers.0.token_mixer.qkvu_proj.weight", (16, 3), (1, 2))
    parameter = torch.arange(16)
    assert torch.cat([parameter[slices[0]] for _, slices in layout.slices()]).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sharded_batch_keeps_positions_within_documents(size):
    from tnllm.modeling.packing import packed_index

    tokens, labels = torch.arange(32)[None], torch.arange(1, 33)[None]
    cu_seqlens = torch.tensor([0, 3, 3, 21, 32, 32], dtype=torch.int32)
    _, positions = packed_index(cu_seqlens, 32)
    slices = [shard_sequence(tokens, labels, cu_seqlens, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([part[0] for part in slices], 1), tokens)
    assert torch.equal(torch.cat([part[1] for part in slices], 1), labels)
    assert all(part[3] is None for part in slices)
    assert torch.cat([packed_index(part[2], 32 // size)[1] for part in slices]).tolist() == positions.tolist()
    rows = [shard_sequence(tokens.view(2, 16), labels.view(2, 16), None, rank, size) for rank in range(size)]
    assert [part[3].tolist() for part in rows] == [[rank * 16 // size] * 2 for rank in range(size)]
