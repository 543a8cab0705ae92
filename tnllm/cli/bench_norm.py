"""`tnllm bench-norm`: SRMSNorm against RMSNorm and LayerNorm."""

import sys
from pathlib import Path

import typer

from tnllm.errors import UserError

EPILOG = "Example:  tnllm bench-norm --widths 1024,4096 --step 385m --json norm.json"


def command(
    widths: str = typer.Option("1024,2048,4096,5120,8192", help="Channels of a row, several with commas."),
    rows: int | None = typer.Option(None, min=1, help="Rows. Default 32768 on a GPU, 2048 on CPU."),
    step: str | None = typer.Option(None, help="Also time a whole training step of this preset with each norm."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON."),
) -> None:
    """Check the norms against float64, then time them alone and in a training step."""
    if not all(part.strip().isdigit() and int(part) for part in widths.split(",")):
        raise UserError(f"--widths is {widths!r}; write channels with commas, such as 1024,4096")
    import torch
    from rich.console import Console
    from rich.table import Table

    from tnllm.bench.norm import bench_norm
    from tnllm.bench.report import write_json
    from tnllm.device import pick_device

    where = pick_device(device, "--device")
    on_gpu = where.type == "cuda"
    results = bench_norm(
        [int(part) for part in widths.split(",")],
        rows or (32768 if on_gpu else 2048),
        torch.bfloat16 if on_gpu else torch.float32,
        where,
        step_preset=step,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(", ".join(f"{key} {value}" for key, value in results["environment"].items()), highlight=False)
    table = Table(title=f"{results['rows']} rows; share of copy bandwidth", title_justify="left")
    for column in ("width", "norm", "error", "fwd ms", "share", "fwd+bwd ms", "share"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for row in results["norms"]:
        shares = (
            f"{row['fwd_ms']:.4f}",
            f"{row['fwd_share']:.0%}",
            f"{row['fwd_bwd_ms']:.4f}",
            f"{row['fwd_bwd_share']:.0%}",
        )
        table.add_row(str(row["width"]), row["norm"], f"{row['error']:.1e}", *shares)
    console.print(table)
    for row in results["steps"]:
        console.print(f"training step of {step} with {row['norm']:<10} {row['step_ms']:.2f} ms", highlight=False)
    if json_file is not None:
        write_json(results, json_file)
