"""Where a rank's shard of a parameter lies in the full one: the table of tensor parallelism, and rows of FSDP.

    layout = Layout.of("layers.0.token_mixer.qkvu_proj.weight", (4096, 1024), tensor=(rank, size))
    layout.shape                                   # what this rank's module holds, before FSDP
    for local, full in layout.with_rows(fsdp=(rank, size)).slices():
        shard[local].copy_(parameter[full])

Initial weights, checkpoints and resuming on another mesh all copy by `slices`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Suffix of a parameter's name → (dim split over tensor ranks, number of equal blocks that are each split).
# The fused projection stacks q, k, v (and u); every rank takes its heads of each.
TENSOR_PLAN: dict[str, tuple[int, int]] = {
    "embed_tokens.weight": (0, 1),
    "lm_head.weight": (0, 1),
    "token_mixer.qkvu_proj.weight": (0, 4),
    "token_mixer.qkv_proj.weight": (0, 3),
    "token_mixer.output_gate.1.weight": (0, 1),
    "token_mixer.norm.weight": (0, 1),
    "token_mixer.lrpe.theta": (0, 1),
    "token_mixer.out_proj.weight": (1, 1),
    "channel_mixer.l1.weight": (0, 1),
    "channel_mixer.l2.weight": (0, 1),
    "channel_mixer.l3.weight": (1, 1),
}
# Replicated over tensor ranks, but each rank computes only its heads' contribution to the gradient.
PARTIAL_GRADIENT = ("token_mixer.output_gate.0.weight",)

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """A rank's shard of one parameter. `rows`: the rows of the tensor-parallel shard that FSDP keeps (None: all)."""

    name: str
    full_shape: tuple[int, ...]
    dim: int | None  # split over tensor ranks; None: replicated
    blocks: int
    tensor: tuple[int, int]  # (rank, size)
    rows: tuple[int, int] | None = None

    @staticmethod
    def of(name: str, full_shape: tuple[int, ...], tensor: tuple[int, int]) -> "Layout":
        """The layout of the parameter `name` of unsharded shape `full_shape` on tensor rank `tensor` = (rank, size)."""
        dim, blocks = next((split for suffix, split in TENSOR_PLAN.items() if name.endswith(suffix)), (None, 1))
        return Layout(name, full_shape, dim if tensor[1] > 1 else None, blocks, tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor-parallel shard."""
        if self.dim is None:
            return self.full_shape
        assert self.full_shape[self.dim] % (self.blocks * self.tensor[1]) == 0, self
        return tuple(n // self.tensor[1] if d == self.dim else n for d, n in enumerate(self.full_shape))

    def with_rows(self, fsdp: tuple[int, int]) -> "Layout":
        """The rows that FSDP rank `fsdp` = (rank, size) keeps: ceil(rows / size) each, as torch.chunk gives them."""
        rank, size = fsdp
        step = -(-self.shape[0] // size)
        return replace(self, rows=(min(self.shape[0], rank * step), min(self.shape[0], (rank + 1) * step)))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's shard."""
        start, end = self.rows or (0, self.shape[0])
        return (end - start, *self.shape[1:])

    def slices(self) -> Iterator[tuple[Slices, Slices]]:
        """Pairs of slices that hold the same elements: of this rank's shard, and of the full parameter."""
        start, end = self.rows or (0, self.shape[0])
        rank, _ = self.tensor
        if self.dim != 0:
            columns: Slices = ()
            if self.dim is not None:
                width = self.shape[self.dim]
                columns = (slice(rank * width, (rank + 1) * width),)
            if end > start:
                yield (slice(0, end - start),), (slice(start, end), *columns)
            return
        height, stride = self.shape[0] // self.blocks, self.full_shape[0] // self.blocks
        for block in range(self.blocks):
            low, high = max(start, block * height), min(end, (block + 1) * height)
            if high > low:
                shift = block * stride + rank * height - block * height
                yield (slice(low - start, high - start),), (slice(low + shift, high + shift),)
