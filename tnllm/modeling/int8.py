"""int8 weights with one scale for each output channel, for decoding on a CPU: a quarter of float32's memory traffic.

    model.quantize_int8()    # in place; activations, state, norms and theta stay as they are

w[o, i] is about scale[o] * q[o, i] with q in -127 ... 127 and scale[o] = max_i |w[o, i]| / 127. Activations are not
rounded, so a row's result does not depend on the other rows. For a few rows the product is torch's sum of weighted int8
rows, made for embeddings (`embedding_bag_byte_rowwise_offsets`; vectorised on x86 alone): the matrix is a table whose rows,
each of 64 or 128 outputs for one input, are summed with the input's values as weights. More rows multiply the matrix in
float32.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

# Above it, a float32 copy of the matrix pays for itself.
_MAX_ROWS = 8


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] → int8 of the same shape, and the scale [out] fp32 of each row."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@lru_cache(maxsize=64)
def _index(num_rows: int, rows: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Indices of all `num_rows` rows of a table, `rows` times, and the offsets of each sum of `inputs` of them."""
    index = torch.arange(num_rows, dtype=torch.int32).repeat(rows)
    return index, torch.arange(0, len(index) + 1, inputs, dtype=torch.int32)


class Int8Linear(nn.Module):
    """x [..., in] → x W^T [..., out] in float32. No gradient. `state_dict` has `weight` [out, in] int8 and `scale`.

    Buffers: `table` uint8 [blocks * in, width + 8], whose last 8 bytes say that a byte b stands for b - 128 (the format of
    torch's operator), and `scale` [out] fp32.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        self.out_features, self.in_features = shape
        self._width = 128 if self.out_features % 128 == 0 else 64
        blocks = -(-self.out_features // self._width)
        table = torch.empty(blocks * self.in_features, self._width + 8, dtype=torch.uint8, device=device)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("scale", torch.empty(self.out_features, device=device), persistent=False)

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> "Int8Linear":
        """Take the values of a matrix [out, in], as a tensor does; one in int8 leaves `scale` as it is."""
        if weight.is_floating_point():
            weight, scale = quantize(weight)
            self.scale.copy_(scale)
        padded = weight.new_zeros(len(self.table) // self.in_features * self._width, self.in_features)
        padded[: self.out_features] = weight
        table = self.table.view(-1, self.in_features, self._width + 8)
        table[..., : self._width] = padded.view(torch.uint8).bitwise_xor_(128).unflatten(0, (-1, self._width)).mT
        table[..., self._width :] = torch.tensor([1.0, -128.0]).view(torch.uint8)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        rounded = self._blocks().mT.flatten(0, 1)[: self.out_features].bitwise_xor(128).view(torch.int8)
        destination.update({f"{prefix}weight": rounded, f"{prefix}scale": self.scale})

    def _blocks(self) -> Tensor:
        """[blocks, in, width] uint8."""
        return self.table.view(-1, self.in_features, self._width + 8)[..., : self._width]

    def dequantized(self) -> Tensor:
        """The matrix [out, in] in float32, laid out input by input."""
        matrix = self._blocks().transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return matrix.sub_(128).flatten(1)[:, : self.out_features].mul_(self.scale).t()

    def sums(self, x: Tensor) -> Tensor:
        """x [B, in] → x q^T [B, out], to be multiplied by `scale`."""
        rows, blocks = len(x), len(self.table) // self.in_features
        index, offsets = _index(len(self.table), rows, self.in_features)
        weights = x[:, None].expand(rows, blocks, self.in_features).reshape(-1)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, index, offsets, False, 0, False, weights, None, True
        )
        return sums.view(rows, -1)[:, : self.out_features]

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        flat = x.float().reshape(-1, self.in_features)
        y = self.sums(flat) * self.scale if len(flat) <= _MAX_ROWS else flat @ self.dequantized().t()
        return y.unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Embedding(Int8Linear):
    """Ids [...] → rows [..., in] of the weight; `product` is the tied head's."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._blocks()[ids // self._width, :, ids % self._width]
        return (rows.float() - 128) * self.scale[ids][..., None]
