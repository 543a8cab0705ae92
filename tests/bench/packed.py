"""Attention of packed rows beside one long text of the same size, in multiples of the memory floor. On a GPU:

python -m tests.bench.packed --json packed.json
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.attention import slopes
from tnllm.bench.report import environment_line, print_table, write_json
from tnllm.bench.timing import copy_bandwidth, measure
from tnllm.device import describe_device
from tnllm.kernels.lightning_attention import lightning_attention
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward

# Documents, tokens, heads, head dim; 0 documents: not packed.
SHAPES = [(64, 65536, 16, 128), (1000, 65536, 8, 128), (7, 50021, 16, 64), (0, 65536, 16, 128), (0, 65536, 8, 128)]


def cut(documents: int, tokens: int, device: torch.device) -> Tensor | None:
    """cu_seqlens of documents with random lengths; None if not packed."""
    if not documents:
        return None
    cuts = sorted(random.Random(0).sample(range(1, tokens), documents - 1))
    return torch.tensor([0, *cuts, tokens], dtype=torch.int32, device=device)


def bench(shape: tuple[int, int, int, int], bandwidth: float, device: torch.device, budget_s: float) -> dict:
    """A row: medians in milliseconds, and in multiples of the time that moving the operands once takes."""
    documents, tokens, heads, head_dim = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, do = (torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(4))
    leaves, log_decay = [x.requires_grad_() for x in (q, k, v)], slopes(heads, device)
    lengths = cut(documents, tokens, device)

    def attend() -> Tensor:
        return lightning_attention(q, k, v, log_decay, cu_seqlens=lengths, need_state=False)[0]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), leaves, do)

    exact = [x.detach().double() for x in (q, k, v)]
    results = zip(
        (attend(), *both()),
        (
            chunk_forward(*exact, log_decay, None, lengths)[0],
            *chunk_backward(do.double(), None, *exact, log_decay, None, lengths)[:3],
        ),
        strict=True,
    )
    errors = dict(zip(("o", "dq", "dk", "dv"), (relative_rms(a, b) for a, b in results), strict=True))
    del exact
    row = dict(zip(("documents", "tokens", "heads", "head_dim"), shape, strict=True)) | errors
    calls: tuple[tuple[str, Callable[[], object], int], ...] = (("fwd", torch.no_grad()(attend), 4), ("both", both, 11))
    for name, call, tensors in calls:
        ms = measure(call, device, budget_s).median_ms
        row |= {f"{name}_ms": ms, f"{name}_x": ms / (tensors * q.numel() * q.element_size() / bandwidth * 1e3)}
    return row


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Packed rows beside one long text.")
    parser.add_argument("--tokens", type=int, help="Instead of each shape's own.")
    parser.add_argument("--seconds", type=float, default=0.3, help="For each measurement.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    environment = describe_device(device) | {"copy_tb_per_s": bandwidth / 1e12}
    print(environment_line(environment))
    rows = []
    for documents, tokens, heads, head_dim in SHAPES:
        tokens = options.tokens or tokens
        rows.append(bench((min(documents, tokens), tokens, heads, head_dim), bandwidth, device, options.seconds))
    columns = [(key, f"{{{key}}}") for key in ("documents", "tokens", "heads", "head_dim")]
    columns += [
        ("fwd ms", "{fwd_ms:.3f}"),
        ("x", "{fwd_x:.2f}"),
        ("fwd+bwd ms", "{both_ms:.3f}"),
        ("x", "{both_x:.2f}"),
    ]
    columns += [(key, f"{{{key}:.1e}}") for key in ("o", "dq", "dk", "dv")]
    print_table("packed rows: times, multiples of the floor, errors against float64", columns, rows)
    if options.json:
        write_json({"environment": environment, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
