"""How wrong linear attention is, by decay and length: relative RMS errors against float64 on the same inputs.

    rows = decay_errors(choose(["tnllm", "fla"], device, dtype, print), [2048, 65536], [0.5, 1e-5], dtype, device, 16, 128)

Long texts and decays near 1 are where errors of the state would pile up; fast decays are where scales could run out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tnllm.bench.providers import Provider
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward

# Slopes of the first and the last layers of a released model, fast and slow heads; 0 never forgets.
SLOPES = (0.84, 0.0625, 0.0039, 1e-5, 0.0)


def decay_errors(
    providers: Sequence[Provider],
    lengths: Sequence[int],
    slopes: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    head_dim: int,
) -> list[dict[str, Any]]:
    """One row for each provider, length and slope: the errors of o, dq, dk and dv; `state` where the provider gives one.

    q and k are random after SiLU, as a model's are. The softmax providers have no decay and are left out.
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
                if provider.softmax or provider.quadratic_memory:
                    continue
                given = [x.transpose(1, 2).contiguous() if provider.heads_first else x.clone() for x in (q, k, v, do)]
                leaves = [x.requires_grad_() for x in given[:3]]
                got = provider.attend(leaves[0], leaves[1], leaves[2], log_decay)
                found = dict(
                    zip(("o", "dq", "dk", "dv"), (got, *torch.autograd.grad(got, leaves, given[3])), strict=True)
                )
                if provider.heads_first:
                    found = {name: x.transpose(1, 2) for name, x in found.items()}
                if provider.state is not None:
                    found["state"] = provider.state(q, k, v, log_decay)
                errors = {
                    name: float((x.detach().double() - exact[name]).norm() / exact[name].norm())
                    for name, x in found.items()
                }
                rows.append({"provider": provider.name, "length": length, "slope": slope, **errors})
    return rows
