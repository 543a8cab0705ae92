"""Weights in int8 with one scale for each output channel, for decoding on a CPU: a quarter of float32's memory traffic.

    model.quantize_int8()    # in place; activations, state, norms and theta stay as they are

w[o, i] is about scale[o] * q[o, i] with q in -127 ... 127 and scale[o] = max_i |w[o, i]| / 127. Activations are not
rounded, so a row's result does not depend on the other rows. For a few rows the product is torch's sum of weighted int8
rows, made for embeddings (`embedding_bag_byte_rowwise_offsets`; vectorised on x86 alone): the matrix is a table whose rows,
each of 64 or 128 outputs for one input, are summed with the input's values as weights. More rows multiply the matrix in
float32.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

# Above it, a float32 copy of the matrix pays for itself.
_MAX_ROWS = 8


@lru_cache(maxsize=64)
def _index(num_rows: int, rows: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Indices of all `num_rows` rows of a table, `rows` times, and the offsets of each sum of `inputs` of them."""
    index = torch.arange(num_rows, dtype=torch.int32).repeat(rows)
    return index, torch.arange(0, len(index) + 1, inputs, dtype=torch.int32)


class Int8Linear(nn.Module):
    """x [..., in] → x W^T [..., out] in float32, from a weight [out, in]. No gradient.

    Buffers: `weight` uint8 [blocks * in, width + 8], whose last 8 bytes say that a byte b stands for b - 128 (the format of
    torch's operator), and `scale` [out] fp32.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int16).add_(128).to(torch.uint8)
        self._width = 128 if len(weight) % 128 == 0 else 64
        blocks = -(-len(weight) // self._width)
        padded = rounded.new_full((blocks * self._width, self.in_features), 128)
        padded[: len(weight)] = rounded
        bytes_ = padded.view(blocks, self._width, self.in_features).transpose(1, 2)
        tail = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(blocks, self.in_features, 8)
        self.register_buffer("weight", torch.cat([bytes_, tail], dim=2).flatten(0, 1))
        self.register_buffer("scale", scale)

    def sums(self, x: Tensor) -> Tensor:
        """x [B, in] → x q^T [B, out], to be multiplied by `scale`."""
        rows, blocks = len(x), len(self.weight) // self.in_features
        index, offsets = _index(len(self.weight), rows, self.in_features)
        weights = x[:, None].expand(rows, blocks, self.in_features).reshape(-1)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.weight, index, offsets, False, 0, False, weights, None, True
        )
        return sums.view(rows, -1)[:, : self.out_features]

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        flat = x.float().reshape(-1, self.in_features)
        if len(flat) <= _MAX_ROWS:
            sums = self.sums(flat)
        else:
            blocks = self.weight.view(-1, self.in_features, self._width + 8)[..., : self._width]
            matrix = blocks.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
            sums = flat @ matrix.sub_(128).flatten(1)[:, : self.out_features]
        return (sums * self.scale).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Embedding(Int8Linear):
    """Ids [...] → rows [..., in] of the weight; `product` is the tied head's."""

    def forward(self, ids: Tensor) -> Tensor:
        blocks = self.weight.view(-1, self.in_features, self._width + 8)
        rows = blocks[ids // self._width, :, ids % self._width]
        return (rows.float() - 128) * self.scale[ids][..., None]
