"""AdamW for weights and moments in bf16: half the memory, with stochastic rounding.

    optimizer = Bf16AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, compiled=True)

bf16 has 8 significant bits, and most updates are smaller than half of the last bit: rounded to nearest they would vanish.
Rounded up or down with a probability given by the bits that are cut off, they are right on average (Gupta et al. 2015,
arXiv 1502.02551; Zamirai et al. 2020, arXiv 2010.06192). The random bits are a hash of parameter, step and element index,
so a run depends on its seed alone, and resuming needs no generator state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Elements updated at a time if not compiled, so that fp32 temporaries stay small compared with the weights.
_CHUNK = 1 << 25
_MASK = 0xFFFFFFFF


class Bf16AdamW(torch.optim.AdamW):
    """AdamW on bf16 parameters (others keep their dtype), computed in fp32.

    State as torch's: step (fp32 scalar), exp_avg and exp_avg_sq in the parameter's dtype. Reads `found_inf` (a scalar
    tensor; nothing is updated if it is 1) as torch's fused form does.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float, compiled: bool = False) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self._update: Callable[..., None] = torch.compile(_update, dynamic=True) if compiled else _update
        self._chunk = 1 << 62 if compiled else _CHUNK
        self._numbers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._one(parameter, group)

    def _one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, device = self.state[parameter], parameter.device
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        # Tensors, like the rate: Python numbers would be compiled again for each value.
        number = self._numbers.setdefault(parameter, torch.full((), len(self._numbers) + 1, device=device))
        skip = torch.zeros((), dtype=torch.bool, device=device) if self.found_inf is None else self.found_inf > 0
        state["step"] += (~skip).float()
        rate = torch.full((), group["lr"], dtype=torch.float32, device=device)
        assert parameter.grad is not None
        flat = [part.reshape(-1) for part in (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"])]
        assert flat[1].data_ptr() == parameter.data_ptr(), "a view, to be written through"
        for start in range(0, len(flat[0]), self._chunk):
            parts = [part[start : start + self._chunk] for part in flat]
            offset = torch.full((), start, device=device)
            settings = (group["weight_decay"], *group["betas"], group["eps"])
            self._update(*parts, state["step"], number, offset, rate, skip, *settings)


def _update(
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    number: Tensor,
    offset: Tensor,
    rate: Tensor,
    skip: Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW update of flat tensors, in place (Loshchilov and Hutter, arXiv 1711.05101)."""
    g = gradient.float()
    m = beta1 * mean.float() + (1 - beta1) * g
    v = beta2 * square.float() + (1 - beta2) * g * g
    scale = (v / (1 - beta2**step)).sqrt() + eps
    w = weight.float() * (1 - rate * weight_decay) - rate * (m / (1 - beta1**step)) / scale
    index = torch.arange(len(g), device=g.device) + offset
    # The step count is below 2^24, so exact in fp32; the golden-ratio multiplier spreads it over all bits.
    noise = _hash(index ^ _hash((step.long() * 2654435769 + number * 40503) & _MASK))
    for old, new, bits in ((weight, w, noise), (mean, m, noise >> 16), (square, v, _hash(noise))):
        old.copy_(torch.where(skip, old, round_randomly(new, bits) if old.dtype == torch.bfloat16 else new))


def _hash(x: Tensor) -> Tensor:
    """Mix the low 32 bits of int64 numbers; every step stays below 2^63."""
    x = x & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` as bf16: up in magnitude where the 16 bits cut off plus the low 16 of `bits` (int64) carry over."""
    carried = x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (carried & -0x10000).view(torch.float32).to(torch.bfloat16)
