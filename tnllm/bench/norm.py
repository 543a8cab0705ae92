"""SRMSNorm beside torch's fused RMSNorm and LayerNorm: alone, and in a whole training step.

results = bench_norm([1024, 4096], rows=16384, dtype=torch.bfloat16, device=torch.device("cuda"), step_preset="385m")
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.bench.timing import copy_bandwidth, measure
from tnllm.device import describe_device
from tnllm.kernels.srms_norm import srms_norm, srms_norm_reference
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model

# Relative RMS error against float64 that is still timed: one rounding of the result, and of the gradient.
ERROR_LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
EPS = 1e-6


def _norms(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each norm with the weights it really carries: none, one vector, one vector (none of them a bias)."""
    weight = torch.ones(width, dtype=dtype, device=device, requires_grad=True)
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "srmsnorm": lambda x: srms_norm(x, EPS),
        "rmsnorm": lambda x: F.rms_norm(x, (width,), weight, EPS),
        "layernorm": lambda x: F.layer_norm(x, (width,), weight, None, EPS),
    }
    if device.type == "cuda":
        compiled = {name: torch.compile(norm) for name, norm in norms.items()}
        norms |= {f"{name}, compiled": norm for name, norm in compiled.items()}
    return norms


def gate(norm: Callable[[Tensor], Tensor], name: str, x: Tensor, dy: Tensor) -> float:
    """Larger of the relative RMS errors of y and dx against float64."""
    exact = x.detach().double().requires_grad_()
    width = x.shape[-1]
    centred = (
        F.layer_norm(exact, (width,), None, None, EPS) if name.startswith("layer") else srms_norm_reference(exact, EPS)
    )
    true = torch.autograd.grad(centred, exact, dy.double())[0]
    y = norm(x)
    pairs = ((y.detach(), centred.detach()), (torch.autograd.grad(y, x, dy)[0], true))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def bench_norm(
    widths: list[int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float = 0.3,
    step_preset: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict:
    """Time each norm on [rows, width]; with `step_preset`, also one eager training step of that model with each norm.

    Shares of bandwidth count x and y forward (2 operands), and x, dy, dx more for forward and backward (5).
    """
    bandwidth = copy_bandwidth(device)
    found = []
    for width in widths:
        x = torch.randn(rows, width, dtype=dtype, device=device).requires_grad_()
        dy = torch.randn(rows, width, dtype=dtype, device=device)
        for name, norm in _norms(width, dtype, device).items():
            note(f"{name} at {width}")
            error = gate(norm, name, x, dy)
            if error > ERROR_LIMIT[dtype]:
                note(f"not timed: {name} is wrong (relative error {error:.2g})")
                continue
            fwd = measure(partial(_forward, norm, x), device, budget_s)
            fwd_bwd = measure(partial(_both, norm, x, dy), device, budget_s)
            found.append(
                {
                    "norm": name,
                    "width": width,
                    "error": error,
                    "fwd_ms": fwd.median_ms,
                    "fwd_share": 2 * x.nbytes / bandwidth / (fwd.median_ms / 1e3),
                    "fwd_bwd_ms": fwd_bwd.median_ms,
                    "fwd_bwd_share": 5 * x.nbytes / bandwidth / (fwd_bwd.median_ms / 1e3),
                }
            )
    steps = (
        []
        if step_preset is None
        else [_step(step_preset, name, device, note) for name in ("srmsnorm", "rmsnorm", "layernorm")]
    )
    environment = {
        **describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_tb_per_s": bandwidth / 1e12,
    }
    return {"environment": environment, "rows": rows, "norms": found, "steps": steps}


def _forward(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return norm(x)


def _both(norm: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(norm(x), x, dy)


def _step(preset: str, norm: str, device: torch.device, note: Callable[[str], None]) -> dict:
    """Forward, backward and AdamW of a whole model on 8 rows of 2048 tokens (CPU: 1 of 256), bf16 autocast, eager."""
    note(f"a training step of {preset} with {norm}")
    model = build_model(get_preset(preset, norm=norm), device, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (8, 2048) if device.type == "cuda" else (1, 256), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(tokens, tokens) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = measure(step, device, budget_s=4.0)
    return {"norm": norm, "step_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
