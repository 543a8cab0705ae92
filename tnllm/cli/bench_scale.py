"""`tnllm bench-scale`: training on several GPUs of this machine, measured on real ranks, by mesh."""

import sys
from pathlib import Path

import typer

from tnllm.cli.lengths import length
from tnllm.errors import UserError

EPILOG = "Example:  tnllm bench-scale --preset 385m --gpus 1,2,4,8 --json scale.json --plot scale.png"

_ALL = "fsdp,tp,sp,fsdp+tp,fsdp+sp,tp+sp"
# Preset, length, tokens a rank, timed steps, steps before.
_GPU = ("385m", "8k", "16k", 8, 3)
_CPU = ("tiny", "256", "1k", 3, 1)


def command(
    preset: str | None = typer.Option(None, help="Sizes: 385m, or 385m,1b. Default 385m on GPUs, tiny on CPU."),
    gpus: str | None = typer.Option(None, help="Numbers of GPUs: 1,2,4. Default 1, 2, 4 ... up to all; 1,2 on CPU."),
    meshes: str = typer.Option(
        _ALL, help="fsdp (shard), tp (tensor), sp (sequence); a product gives its second axis 2 and needs 4 GPUs."
    ),
    seq_len: str | None = typer.Option(
        None, help="Tokens of a row where no row is split. Default 8k on GPUs, 256 on CPU."
    ),
    tokens_per_gpu: str | None = typer.Option(
        None, help="Tokens of a step on one GPU; with sp, the length of each rank's slice. Default 16k, 1k on CPU."
    ),
    longest: bool = typer.Option(
        False, "--longest", help="Then double one row, on one GPU and with sp, until it fails."
    ),
    activation_checkpointing: str = typer.Option("none", help="none, selective or full."),
    steps: int | None = typer.Option(None, min=1, help="Steps timed. Default 8 on GPUs, 3 on CPU."),
    warmup: int | None = typer.Option(None, min=0, help="Steps before, after the first. Default 3 on GPUs, 1 on CPU."),
    dtype: str = typer.Option("auto", help="auto (bf16 on GPUs, fp32 on CPU), bf16 or fp32; the compute type."),
    device: str = typer.Option("auto", help="auto, cuda or cpu."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON, anew after each row."),
    csv_file: Path | None = typer.Option(None, "--csv", help="Write the rows as CSV."),
    plot: Path | None = typer.Option(None, "--plot", help="Write a chart (png, svg or pdf)."),
) -> None:
    """Check each mesh against one process, then time it: tokens/s, efficiency, memory and communication by GPUs."""
    for flag, value, allowed in (
        ("--device", device, ("auto", "cuda", "cpu")),
        ("--dtype", dtype, ("auto", "bf16", "fp32")),
        ("--activation-checkpointing", activation_checkpointing, ("none", "selective", "full")),
    ):
        if value not in allowed:
            raise UserError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}")
    for file in (json_file, csv_file, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"there is no folder {file.parent} to write {file.name} into; make it first")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot is {plot}; its name must end in .png, .svg or .pdf")
    counts = _counts(gpus) if gpus else None
    import torch

    from tnllm.bench.report import write_json
    from tnllm.bench.scale import Settings, bench_scale, check_passed, scale_cases
    from tnllm.bench.scale_report import (
        longest_rows,
        plot_scale,
        print_scale_head,
        print_scale_row,
        write_scale_csv,
    )

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but torch sees no CUDA device; run tnllm doctor")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    presets, default_length, default_tokens, default_steps, default_warmup = _GPU if on_gpu else _CPU
    there = torch.cuda.device_count() if on_gpu else 0
    if on_gpu and counts and max(counts) > there:
        raise UserError(f"--gpus has {max(counts)}, but torch sees {there} on this machine")
    if not on_gpu:
        if longest:
            raise UserError("--longest fills the memory of GPUs, and none is in use; leave it out")
        _note("no GPU in use: ranks on this CPU speak gloo, which says nothing about GPUs; expect about a minute")
    if counts is None:
        counts = [1 << power for power in range(there.bit_length())] if on_gpu else [1, 2]
    cases = scale_cases(
        _words(preset or presets),
        counts,
        _words(meshes),
        length(seq_len or default_length, "--seq-len"),
        length(tokens_per_gpu or default_tokens, "--tokens-per-gpu"),
        activation_checkpointing,
    )
    settings = Settings(
        "cuda" if on_gpu else "cpu",
        dtype,
        compiled=on_gpu,
        steps=steps or default_steps,
        warmup=default_warmup if warmup is None else warmup,
    )

    def on_row(row: dict, results: dict) -> None:
        if len(results["rows"]) == 1:
            print_scale_head(results)
        print_scale_row(row)
        if json_file is not None:
            write_json(results, json_file)

    results = bench_scale(cases, settings, longest, _note, on_row)
    for line in longest_rows(results["rows"]):
        print(line)
    for file, write in ((json_file, write_json), (csv_file, write_scale_csv), (plot, plot_scale)):
        if file is not None:
            write(results, file)
            _note(f"wrote {file}")
    check_passed(results)


def _counts(text: str) -> list[int]:
    words = _words(text)
    for word in words:
        if not word.isdigit() or int(word) == 0:
            raise UserError(f"--gpus has {word!r}; write numbers such as 1,2,4")
    return [int(word) for word in words]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
