"""Errors of linear attention by decay and length, relative RMS against float64 on the same inputs.

    rows = decay_errors(choose(["tnllm", "fla"], device, dtype, print), [2048, 65536], [0.5, 1e-5], dtype, device, 16, 128)

Errors of the state would accumulate in long sequences with decays near 1; scales could overflow with fast decays.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.bench.providers import Provider, outputs_and_gradients
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward

# Slopes of the first and the last layers of a released model, fast and slow heads; 0 is no decay.
SLOPES = (0.84, 0.0625, 0.0039, 1e-5, 0.0)


def relative_rms(result: Tensor, exact: Tensor) -> float:
    """RMS of the error over the RMS of `exact`, in float64."""
    exact = exact.double()
    return float((result.detach().double() - exact).norm() / exact.norm())


def decay_errors(
    providers: Sequence[Provider],
    lengths: Sequence[int],
    slopes: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    head_dim: int,
) -> list[dict[str, Any]]:
    """One row per provider, length and slope: the errors of o, dq, dk and dv, and `state` if the provider returns it.

    q and k are random after SiLU, as in a model. Providers of another function are left out.
    """
    rows = []
    for length in lengths:
        for slope in slopes:
            log_decay = torch.full((heads,), -slope, device=device)
            shape = (1, length, heads, head_dim)
            q, k, v, do = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
            q, k = F.silu(q) * head_dim**-0.5, F.silu(k)
            wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
            o, state = chunk_forward(wide_q, wide_k, wide_v, log_decay, None, None)
            dq, dk, dv, _ = chunk_backward(do.double(), None, wide_q, wide_k, wide_v, log_decay, None, None)
            exact = {"o": o, "dq": dq, "dk": dk, "dv": dv, "state": state}
            for provider in providers:
                if provider.differs or provider.quadratic_memory:
                    continue
                results = outputs_and_gradients(provider, [q, k, v, do], log_decay)
                if provider.state is not None:
                    results["state"] = provider.state(q, k, v, log_decay)
                errors = {name: relative_rms(x, exact[name]) for name, x in results.items()}
                rows.append({"provider": provider.name, "length": length, "slope": slope, **errors})
    return rows
