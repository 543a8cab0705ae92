"""`tnllm bench-attn`: Lightning Attention against its peers, by length."""

from functools import partial
from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.errors import UserError
from tnllm.progress import log

EPILOG = options.examples("tnllm bench-attn --seqlens 1k:64k --json attention.json --plot attention.png")

# Lengths, heads, width of a head, dtype.
_GPU = ("1k:64k", 16, 128, "bf16")
_CPU = ("256:2k", 4, 64, "fp32")
_GPU_PROVIDERS = "tnllm,torch,fla,lightning-attn,mlstm,flash-qla,flashinfer,sdpa-flash,sdpa-cudnn"
_CPU_PROVIDERS = "tnllm,torch,sdpa"


def command(
    seqlen: int | None = typer.Option(None, min=1, help="One length in tokens: --seqlen 65536."),
    seqlens: str | None = typer.Option(None, help="Several: 1k,4k,16k, or 1k:128k for every doubling."),
    shapes: list[str] = typer.Option([], "--shape", help="BATCHxHEADSxLENGTHxDIM instead of the above. Repeatable."),
    batch: int = typer.Option(1, min=1, help="Rows."),
    fixed_tokens: str | None = typer.Option(None, help="Keep batch * length at this many tokens, such as 1m."),
    heads: int | None = typer.Option(None, min=1, help="Heads. Default 16 on a GPU, 4 on CPU."),
    head_dim: int | None = typer.Option(None, min=1, help="Width of a head. Default 128 on a GPU, 64 on CPU."),
    dtype: str | None = typer.Option(None, help="bf16, fp16 or fp32. Default bf16 on a GPU, fp32 on CPU."),
    providers: str | None = typer.Option(None, help=f"Among {_GPU_PROVIDERS}; on CPU {_CPU_PROVIDERS}."),
    device: str = options.DEVICE,
    accuracy: bool = typer.Option(False, "--accuracy", help="Only errors against float64, by decay and length."),
    seconds: float = typer.Option(0.5, min=0.01, help="Time spent on each measurement."),
    max_minutes: float | None = options.MAX_MINUTES,
    json_file: Path | None = options.JSON_FILE,
    csv_file: Path | None = options.CSV_FILE,
    plot: Path | None = options.PLOT,
) -> None:
    """Check attention against float64, then time it beside its peers: forward, backward, memory, by length."""
    if seqlen is not None and seqlens is not None:
        raise UserError("both --seqlen and --seqlens are given; use one of them")
    chosen = [seqlen] if seqlen is not None else options.lengths(seqlens, "--seqlens") if seqlens is not None else None
    if shapes and (chosen is not None or fixed_tokens is not None):
        raise UserError("--shape gives lengths itself; leave out --seqlen, --seqlens and --fixed-tokens")
    tokens = options.length(fixed_tokens, "--fixed-tokens") if fixed_tokens else None
    options.check_choice("--dtype", dtype, ("bf16", "fp16", "fp32"))
    options.check_outputs(json_file, csv_file, plot=plot)
    import torch

    from tnllm.bench.attention import Shape, bench_attention
    from tnllm.bench.budget import Budget
    from tnllm.bench.report import write_csv, write_json
    from tnllm.bench.tables import plot_attention, print_errors, print_results
    from tnllm.device import pick_device

    where = pick_device(device, "--device")
    on_gpu = where.type == "cuda"
    default_lengths, default_heads, default_dim, default_dtype = _GPU if on_gpu else _CPU
    if not on_gpu:
        log("no GPU in use: the chunked torch form against the quadratic one and SDPA, at sizes for a CPU")
    name = dtype or default_dtype
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    chosen = chosen or options.lengths(default_lengths, "--seqlens")
    heads, head_dim = heads or default_heads, head_dim or default_dim
    points = [Shape(*_shape(text)) for text in shapes] or [
        Shape(max(1, tokens // count) if tokens else batch, heads, count, head_dim) for count in chosen
    ]
    names = [part.strip() for part in (providers or (_GPU_PROVIDERS if on_gpu else _CPU_PROVIDERS)).split(",")]
    if accuracy:
        from tnllm.bench.accuracy import SLOPES, decay_errors
        from tnllm.bench.attention import choose
        from tnllm.device import describe_device

        rows = decay_errors(choose(names, where, kind, log), chosen, SLOPES, kind, where, heads, head_dim)
        environment = describe_device(where) | {"dtype": name}
        print_errors(environment, rows)
        options.write_outputs({"environment": environment, "rows": rows}, (json_file, write_json))
        return

    on_row = partial(write_json, path=json_file) if json_file else lambda results: None
    budget = Budget(max_minutes if max_minutes is not None else 60 if on_gpu else 1, log)
    results = bench_attention(points, kind, names, where, seconds, log, on_row, budget)
    print_results(results)
    options.write_outputs(results, (json_file, write_json), (csv_file, write_csv), (plot, plot_attention))
    budget.close()


def _shape(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != 4:
        raise UserError(f"--shape is {text!r}; write BATCHxHEADSxLENGTHxDIM, such as 8x16x2048x128")
    return [options.length(part, "--shape") for part in parts]
