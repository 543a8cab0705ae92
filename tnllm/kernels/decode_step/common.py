"""What both decode kernels share: their input, the table of weight addresses and small device functions."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of the address table, which has one row per layer.
QKVU, OUT, UP, GATE, DOWN, STATE, THETA, NUM_COLUMNS = (tl.constexpr(column) for column in range(8))


@triton.jit
def load_pointer(table, layer, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """The pointer in one entry of the address table. Weights and states are at least 16-byte aligned."""
    return tl.multiple_of(tl.load(table + layer * NUM_COLUMNS + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def program_rows(tile, P, R: tl.constexpr):
    """[R] the rows in tile number `tile` of this program, which owns the rows r = program_id mod P of every matrix."""
    return tl.program_id(0) + P * (tile * R + tl.arange(0, R))


@triton.jit
def prefetch_l2(p, size, mask):
    """Prefetch `size` bytes from each address p into L2 where `mask` holds. Unlike a load it does not queue with loads."""
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; "
        "@wanted cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [p, mask.to(tl.int32), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def exp_minus_one(g):
    """exp(g) - 1: float32 cannot tell the slowest decays (1 - 4e-8) from their neighbours; see `chunk_step`."""
    return tl.where(g > -0.01, g * (1.0 + g * (0.5 + g * 0.16666667)), tl.exp(g) - 1.0)


@triton.jit
def update_state(
    b_s, p_s, q, k, v, decay_minus_one, theta, position, row, head, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr
):
    """One step of S = decay S + k v^T on the tile b_s [BD, BE] of a state, loaded from p_s; q, k [BD] and v [BE] are fp32.

    Where the layer has LRPE (`theta` is an address, not 0), q and k become [q cos; q sin] and [k cos; k sin]: the tile of
    the state's second half, D rows further on, is updated in place. Returns the new b_s, the q to multiply it with, and
    what the second half adds to o [BE].
    """
    d = tl.arange(0, BD)
    m_d = (d < D)[:, None]
    b_o = tl.zeros([BE], tl.float32)
    if theta != 0:
        # The angle is reduced to one turn in float64, as positions reach 10^6.
        p_theta = theta.to(tl.pointer_type(tl.float32)) + head * D + d
        turns = tl.load(p_theta, mask=d < D, other=0.0).to(tl.float64) * 0.15915494309189535
        turns *= tl.load(position + row).to(tl.float64)
        angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
        b_t = tl.load(p_s + D * D, mask=m_d, other=0.0)
        b_t += decay_minus_one * b_t + (k * tl.sin(angle))[:, None] * v[None, :]
        tl.store(p_s + D * D, b_t, mask=m_d)
        b_o = tl.sum((q * tl.sin(angle))[:, None] * b_t, 0)
        q, k = q * tl.cos(angle), k * tl.cos(angle)
    b_s += decay_minus_one * b_s + k[:, None] * v[None, :]
    return b_s, q, b_o


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, [out, in], contiguous, of one dtype; its state [B, H, D or 2D, D] fp32; theta [H, 1, D]."""

    qkvu: Tensor
    out: Tensor
    up: Tensor
    gate: Tensor
    down: Tensor
    state: Tensor
    theta: Tensor | None


@dataclass(frozen=True)
class DecodeModel:
    """Everything a decode step reads and updates. The kernels hold bare addresses, so the tensors must not move."""

    layers: list[Layer]
    embedding: Tensor  # [V, M] in the weights' dtype: bf16, fp16 or fp32
    head: Tensor  # [V, M]
    log_decay: Tensor  # [L, H] fp32, contiguous
    position: Tensor  # [B] int64
    scale: float  # multiplies the embedding
    eps: float
    silu: tuple[bool, bool, bool]  # whether q and k, v, and the first half of the channel mixer go through SiLU
    num_choices: int  # the argmax is taken over the first `num_choices` ids; the rest pad the vocabulary

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, V, M, F, H, D."""
        (V, M), F = self.head.shape, self.layers[0].up.shape[0]
        B, H, _, D = self.layers[0].state.shape
        return B, V, M, F, H, D

    def address_table(self) -> list[list[int]]:
        """One row per layer, columns as numbered above; 0 where a layer has no theta."""
        return [
            [x.data_ptr() for x in (layer.qkvu, layer.out, layer.up, layer.gate, layer.down, layer.state)]
            + [0 if layer.theta is None else layer.theta.data_ptr()]
            for layer in self.layers
        ]

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers on the model's device: tokens [B] int64, logits [B, V] fp32 and the argmax token's logit [B] fp32."""
        B, V = self.sizes[:2]
        tokens = torch.zeros(B, dtype=torch.int64, device=self.head.device)
        logits = torch.zeros(B, V, dtype=torch.float32, device=self.head.device)
        return tokens, logits, torch.zeros(B, dtype=torch.float32, device=self.head.device)

    def prefetches(self, alignment: int) -> bool:
        """Whether weights can be prefetched in bulk: the GPU can, and rows are multiples of `alignment` bytes."""
        row_bytes = (width * self.head.element_size() for width in (self.sizes[2], self.sizes[3]))
        return has_bulk_prefetch(self.head.device) and all(size % alignment == 0 for size in row_bytes)


def num_programs(device: torch.device) -> int:
    """One per SM; a single one on a CPU, for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_bulk_prefetch(device: torch.device) -> bool:
    """Whether cp.async.bulk.prefetch.L2 is available (sm_90 and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Programs wait for one another, so all must be resident at once: a cooperative launch fails where they do not fit."""
    return {"launch_cooperative_grid": True} if device.type == "cuda" else {}
