"""SRMSNorm beside torch's fused RMSNorm and LayerNorm: alone, and in a full training step.

results = bench_norm([1024, 4096], rows=16384, dtype=torch.bfloat16, device=torch.device("cuda"), step_preset="385m")
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.timing import copy_bandwidth, measure
from tnllm.device import describe_device
from tnllm.kernels.srms_norm import srms_norm, srms_norm_reference
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model

# Relative RMS error against float64 that is still timed: one rounding of the result, and of the gradient.
ERROR_LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
EPS = 1e-6


def _norms(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each norm with its own weights: none, one vector, one vector (no bias)."""
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


def check(norm: Callable[[Tensor], Tensor], name: str, x: Tensor, dy: Tensor) -> float:
    """Larger of the relative RMS errors of y and dx against float64."""
    exact = x.detach().double().requires_grad_()
    if name.startswith("layer"):
        expected = F.layer_norm(exact, (x.shape[-1],), None, None, EPS)
    else:
        expected = srms_norm_reference(exact, EPS)
    expected_grad = torch.autograd.grad(expected, exact, dy.double())[0]
    y = norm(x)
    pairs = ((y, expected.detach()), (torch.autograd.grad(y, x, dy)[0], expected_grad))
    return max(relative_rms(result, true) for result, true in pairs)


def bench_norm(
    widths: list[int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float = 0.3,
    step_preset: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict:
    """Time each norm on [rows, width]; with `step_preset`, also one eager training step of that model with each norm.

    Shares of bandwidth count x and y forward (2 operands), and x, dy, dx more for forward and backward (5).
    """
    bandwidth = copy_bandwidth(device)
    norms = []
    for width in widths:
        x = torch.randn(rows, width, dtype=dtype, device=device).requires_grad_()
        dy = torch.randn(rows, width, dtype=dtype, device=device)
        for name, norm in _norms(width, dtype, device).items():
            log(f"{name} at {width}")
            error = check(norm, name, x, dy)
            if error > ERROR_LIMIT[dtype]:
                log(f"not timed: {name} is wrong (relative error {error:.2g})")
                continue
            fwd = measure(partial(_forward, norm, x), device, budget_s)
            fwd_bwd = measure(partial(_both, norm, x, dy), device, budget_s)
            norms.append(
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
    names = () if step_preset is None else ("srmsnorm", "rmsnorm", "layernorm")
    steps = [_step(step_preset or "", name, device, log) for name in names]
    environment = {
        **describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_tb_per_s": bandwidth / 1e12,
    }
    return {"environment": environment, "rows": rows, "norms": norms, "steps": steps}


def _forward(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return norm(x)


def _both(norm: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(norm(x), x, dy)


def _step(preset: str, norm: str, device: torch.device, log: Callable[[str], None]) -> dict:
    """Forward, backward and AdamW of a full model on 8 rows of 2048 tokens (CPU: 1 of 256), bf16 autocast, eager."""
    log(f"a training step of {preset} with {norm}")
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
