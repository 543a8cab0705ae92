"""`tnllm bench-decode`: what a token costs by position and by batch, beside a Transformer with its key-value cache."""

from functools import partial
from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.progress import log

EPILOG = options.examples("tnllm bench-decode --preset 385m --json decode.json --plot decode.png")

# Preset, positions, batches, contexts of the baseline, seconds for a measurement.
_GPU = ("385m", "1k:1m", "1,4,16,64,256,1024", "1k,16k", 0.5)
_CPU = ("demo", "1k,16k,256k,1m", "1,4,16", "1k,16k", 0.2)
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "int8": "int8"}


def command(
    preset: str | None = typer.Option(None, help="Size, random weights. Default 385m on a GPU, demo on CPU."),
    softmax_every: int = options.SOFTMAX_EVERY,
    positions: str | None = typer.Option(None, help="Tokens before the step of one row: 1k,64k, or 1k:1m, doubling."),
    batches: str | None = typer.Option(None, help="Rows decoded together: 1,16,256 or 1:1k for every doubling."),
    contexts: str | None = typer.Option(None, help="Tokens in the Transformer's cache: 1k,16k (default), or none."),
    dtype: str | None = typer.Option(None, help="bf16, fp32, or on a CPU int8. Default bf16 on a GPU, fp32 on CPU."),
    device: str = options.DEVICE,
    seconds: float | None = typer.Option(None, min=0.01, help="Time spent on each measurement."),
    prompt_lookup: int = typer.Option(0, min=0, max=64, help="Also time texts with proposals of so many tokens."),
    max_minutes: float | None = options.MAX_MINUTES,
    compile_: bool = typer.Option(True, "--compile/--no-compile", help="Compile the Transformer's step (GPU only)."),
    json_file: Path | None = options.JSON_FILE,
    csv_file: Path | None = options.CSV_FILE,
    plot: Path | None = options.PLOT,
) -> None:
    """Check the decoding step against the full forward pass, then time it by position and by batch."""
    options.check_choice("--dtype", dtype, tuple(_DTYPES))
    options.check_outputs(json_file, csv_file, plot=plot)
    import torch

    from tnllm.bench.budget import Budget
    from tnllm.bench.decode import bench_decode
    from tnllm.bench.report import write_csv, write_json
    from tnllm.bench.tables import plot_decode, print_decode
    from tnllm.device import pick_device
    from tnllm.generation.loading import pick_dtype

    where = pick_device(device, "--device")
    wanted = pick_dtype(_DTYPES.get(dtype or "", "auto"), where) or torch.bfloat16
    on_gpu = where.type == "cuda"
    defaults = _GPU if on_gpu else _CPU
    if not on_gpu:
        log("no GPU in use: small defaults that take under a minute; steps are plain torch, the baseline eager")
    cached = contexts or defaults[3]
    on_row = partial(write_json, path=json_file) if json_file else lambda results: None
    budget = Budget(max_minutes if max_minutes is not None else 60 if on_gpu else 1, log)
    results = bench_decode(
        preset or defaults[0], options.lengths(positions or defaults[1], "--positions"),
        options.lengths(batches or defaults[2], "--batches"),
        [] if cached == "none" else options.lengths(cached, "--contexts"),
        wanted, where, seconds or defaults[4], compile_,
        log, on_row, budget, softmax_every, prompt_lookup,
    )  # fmt: skip
    print_decode(results)
    options.write_outputs(results, (json_file, write_json), (csv_file, write_csv), (plot, plot_decode))
    budget.close()
