"""AdamW with and without weight decay by parameter, an update that skips non-finite gradients, and the learning rate.

optimizer = make_optimizer(model, config.optimizer)
rate = learning_rate(config.schedule, config.optimizer.learning_rate, step)     # a pure function of the update number
norm = clip_and_step(model, optimizer, rate, max_norm=1.0, loss=loss)
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tnllm.training.bf16_adamw import Bf16AdamW
from tnllm.training.sections import OptimizerSection, ScheduleSection

if TYPE_CHECKING:
    from tnllm.parallel.parallelize import ShardedModel


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and embeddings; not to norm weights, biases, or LRPE's theta.

    theta holds frequencies; decayed to zero, it would lose the positions it encodes.
    """
    return parameter.ndim >= 2 and not name.endswith("lrpe.theta")


def make_optimizer(
    model: "nn.Module | ShardedModel", config: OptimizerSection, compiled: bool = False
) -> torch.optim.AdamW:
    """AdamW over two groups of `model`'s trained parameters: torch's fused one, or Bf16AdamW for bf16 weights.

    `compiled` compiles the update of the latter, which is plain torch.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if any(p.dtype == torch.bfloat16 for _, p in named):
        return Bf16AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, compiled=compiled)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def clip_and_step(
    model: "nn.Module | ShardedModel",
    optimizer: torch.optim.AdamW,
    learning_rate: float,
    max_norm: float,
    loss: Tensor,
    norm: Tensor | None = None,
    is_spike: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Clip the gradients to a total norm of `max_norm` (0: no clipping) and update; returns the norm before clipping.

    `norm`: the norm of all gradients if `model` holds only a shard of them; None: computed here. If the norm or `loss` is
    not finite, or `is_spike(loss, norm)`, nothing is updated: neither weights nor moments nor the step count. The decision
    is made on the device, so no step waits for the host.
    """
    parameters = list(model.parameters())
    if norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    refused = ~(torch.isfinite(norm) & torch.isfinite(loss))
    if is_spike is not None:
        refused = refused | is_spike(loss, norm)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # The fused kernels read this flag, as with gradient scaling, and update nothing if it is 1.
    optimizer.grad_scale, optimizer.found_inf = None, refused.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(schedule: ScheduleSection, peak: float, step: int) -> float:
    """Learning rate of update `step` (the first is 0).

    Linear warm-up over `warmup_steps`, reaching `peak` with the last of them; then constant; or a fall to the floor
    `min_ratio * peak`, which the last update before `horizon_steps` is at: cosine, linear, or wsd, which stays at the
    peak and falls linearly over the last `decay_steps` (default: a tenth of the horizon, or what warm-up leaves of it).
    After the horizon the rate stays at the floor. The horizon is a key of its own, so two runs that differ only in length
    agree step for step.
    """
    floor, horizon, warmup = schedule.min_ratio, schedule.horizon_steps, schedule.warmup_steps
    assert horizon is not None and warmup is not None, "a loaded recipe has both, once the data of its epochs is known"
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    fall = horizon - warmup
    if schedule.kind == "wsd":
        fall = schedule.decay_steps or min(max(1, horizon // 10), fall)
    # Counted from the update before the fall, so that the last update of the horizon has all of it.
    progress = min(1.0, max(0.0, (step + 1 - (horizon - fall)) / fall))
    if schedule.kind == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return peak * (1 - (1 - floor) * progress)
