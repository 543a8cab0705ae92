"""`tnllm bench-norm`: SRMSNorm against RMSNorm and LayerNorm."""

from pathlib import Path

import typer

from tnllm.cli.options import DEVICE, check_outputs, counts, examples, write_outputs
from tnllm.progress import log

EPILOG = examples("tnllm bench-norm --widths 1024,4096 --step 385m --json norm.json")


def command(
    widths: str = typer.Option("1024,2048,4096,5120,8192", help="Channels of a row, several with commas."),
    rows: int | None = typer.Option(None, min=1, help="Rows. Default 32768 on a GPU, 2048 on CPU."),
    step: str | None = typer.Option(None, help="Also time a full training step of this preset with each norm."),
    device: str = DEVICE,
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON."),
) -> None:
    """Check the norms against float64, then time them alone and in a training step."""
    check_outputs(json_file)
    channels = counts(widths, "--widths", "1024,4096")
    import torch

    from tnllm.bench.norm import bench_norm
    from tnllm.bench.report import environment_line, print_table, write_json
    from tnllm.device import pick_device

    where = pick_device(device, "--device")
    on_gpu = where.type == "cuda"
    results = bench_norm(
        channels,
        rows or (32768 if on_gpu else 2048),
        torch.bfloat16 if on_gpu else torch.float32,
        where,
        step_preset=step,
        log=log,
    )
    print(environment_line(results["environment"]))
    columns = [
        ("width", "{width}"), ("norm", "{norm}"), ("error", "{error:.1e}"), ("fwd ms", "{fwd_ms:.4f}"),
        ("share", "{fwd_share:.0%}"), ("fwd+bwd ms", "{fwd_bwd_ms:.4f}"), ("share", "{fwd_bwd_share:.0%}"),
    ]  # fmt: skip
    print_table(f"{results['rows']} rows; share of copy bandwidth", columns, results["norms"], left=("norm",))
    for row in results["steps"]:
        print(f"training step of {step} with {row['norm']:<10} {row['step_ms']:.2f} ms")
    write_outputs(results, (json_file, write_json))
