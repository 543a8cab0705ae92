"""SRMSNorm beside torch's fused RMSNorm and LayerNorm: alone, and in a full training step. On a GPU, else on the CPU:

python -m tests.bench.norm --widths 1024,4096 --step 385m --json norm.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.report import environment_line, print_table, write_json
from tnllm.bench.timing import copy_bandwidth, measure
from tnllm.device import describe_device
from tnllm.kernels.srms_norm import srms_norm, srms_norm_reference
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.progress import log as log_line

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


def main(args: list[str] | None = None) -> None:
    """Command line: check the norms against float64, then time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="1024,2048,4096,5120,8192")
    parser.add_argument("--rows", type=int, help="default: 32768 on a GPU, 2048 on the CPU")
    parser.add_argument("--step", help="also time a full training step of this preset with each norm")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(args)
    on_gpu = torch.cuda.is_available()
    results = bench_norm(
        [int(width) for width in given.widths.split(",")],
        given.rows or (32768 if on_gpu else 2048),
        torch.bfloat16 if on_gpu else torch.float32,
        torch.device("cuda" if on_gpu else "cpu"),
        step_preset=given.step,
        log=log_line,
    )
    print(environment_line(results["environment"]))
    columns = [
        ("width", "{width}"), ("norm", "{norm}"), ("error", "{error:.1e}"), ("fwd ms", "{fwd_ms:.4f}"),
        ("share", "{fwd_share:.0%}"), ("fwd+bwd ms", "{fwd_bwd_ms:.4f}"), ("share", "{fwd_bwd_share:.0%}"),
    ]  # fmt: skip
    print_table(f"{results['rows']} rows; share of copy bandwidth", columns, results["norms"], left=("norm",))
    for row in results["steps"]:
        print(f"training step of {given.step} with {row['norm']:<10} {row['step_ms']:.2f} ms")
    if given.json is not None:
        write_json(results, given.json)


if __name__ == "__main__":
    main()
