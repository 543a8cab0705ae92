"""AdamW with and without weight decay by parameter, and an update that skips non-finite gradients.

optimizer = make_optimizer(model, config.optimizer)
norm = clip_and_step(model, optimizer, learning_rate=3e-4, max_norm=1.0, loss=loss)
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from tnllm.training.bf16_adamw import Bf16AdamW
from tnllm.training.sections import OptimizerSection


class Parameters(Protocol):
    """Named parameters: a module's, or a rank's shards of a model on a mesh."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and embeddings; not to norm weights, biases, or LRPE's theta.

    theta holds frequencies; decayed to zero, it would lose the positions it encodes.
    """
    return parameter.ndim >= 2 and not name.endswith("lrpe.theta")


def make_optimizer(model: Parameters, config: OptimizerSection, compiled: bool = False) -> torch.optim.AdamW:
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
    model: Parameters,
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
