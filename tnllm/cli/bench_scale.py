"""`tnllm bench-scale`: training on 1, 2, 4 … GPUs of this machine, by mesh: correctness first, then speed and memory."""

from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.errors import RunError, UserError
from tnllm.progress import log

EPILOG = options.examples(
    "tnllm bench-scale --preset 385m,1b --gpus 1,2 --meshes fsdp,tp,sp --json scale.json --plot scale.png"
)

# Preset, length of a row, rows, timed steps, warm-up steps.
_GPU = ("385m", "4k", 8, 10, 3)
_CPU = ("tiny", "128", 2, 3, 1)
_PRODUCTS = ("fsdp+tp", "fsdp+sp", "sp+tp")


def command(
    preset: str | None = typer.Option(None, help="Sizes: 385m, or 385m,1b,7b. Default 385m on GPUs, tiny on CPU."),
    gpus: str | None = typer.Option(None, help="Numbers of GPUs: 1,2,4. Default: 1, 2, 4 … as torch sees; 1,2 on CPU."),
    meshes: str | None = typer.Option(
        None, help="fsdp, tp, sp, ddp, products such as fsdp+tp, or sizes: shard=2+sequence=4. Default: all that fit."
    ),
    seq_len: str | None = typer.Option(None, help="Tokens in a row of one GPU. Default 4k on GPUs, 128 on CPU."),
    rows: int | None = typer.Option(None, min=1, help="Rows of one GPU in a step. Default 8 on GPUs, 2 on CPU."),
    activation_checkpointing: str = typer.Option("none", help="none, selective or full."),
    dtype: str = typer.Option("auto", help="auto (bf16 on GPUs, fp32 on CPU), bf16 or fp32; the compute type."),
    compile: bool | None = typer.Option(None, help="torch.compile. Default: on GPUs."),
    steps: int | None = typer.Option(None, min=1, help="Steps timed. Default 10 on GPUs, 3 on CPU."),
    warmup: int | None = typer.Option(None, min=1, help="Steps before, after the first. Default 3 on GPUs, 1 on CPU."),
    longest: bool = typer.Option(
        False, "--longest", help="Also double a row until it does not fit, on one GPU and with sequence parallelism."
    ),
    timeout_s: float = typer.Option(300, min=1, help="Give up a case after so many seconds without any report."),
    max_minutes: float | None = options.MAX_MINUTES,
    device: str = typer.Option("auto", help="auto, cuda or cpu."),
    json_file: Path | None = typer.Option(
        None,
        "--json",
        help="Write every figure as JSON. FILE.cases beside it lets the same command resume a stopped run.",
    ),
    csv_file: Path | None = options.CSV_FILE,
    plot: Path | None = options.PLOT,
) -> None:
    """Train on 1, 2, 4 … GPUs: check each mesh against one GPU, then tokens/s, efficiency, memory and communication."""
    options.check_choice("--device", device, ("auto", "cuda", "cpu"))
    options.check_choice("--dtype", dtype, ("auto", "bf16", "fp32"))
    options.check_choice("--activation-checkpointing", activation_checkpointing, ("none", "selective", "full"))
    options.check_outputs(json_file, csv_file, plot=plot)
    import torch

    from tnllm.bench.budget import Budget
    from tnllm.bench.report import write_csv, write_json
    from tnllm.bench.scale import Plan, bench_scaling
    from tnllm.bench.tables import plot_scaling, print_check, print_environment, print_row, summary
    from tnllm.device import pick_device

    # Only counted: a CUDA context in this process would take memory from the ranks.
    seen = torch.cuda.device_count()
    if device == "cuda":
        pick_device(device, "--device")
    on_gpu = seen > 0 and device != "cpu"
    default_preset, default_length, default_rows, default_steps, default_warmup = _GPU if on_gpu else _CPU
    if not on_gpu:
        log("no GPU in use: CPU processes instead, whose figures say nothing about GPUs; expect a minute or two")
        if longest:
            raise UserError("--longest fills a GPU's memory; it needs a GPU")
    numbers = _numbers(gpus, seen) if on_gpu or gpus else [1, 2]
    if on_gpu and max(numbers) > seen:
        raise UserError(f"--gpus is {gpus}, but torch sees {seen}; give at most that many")
    plan = Plan(
        [name.strip() for name in (preset or default_preset).split(",")], numbers, _meshes(meshes, numbers),
        "cuda" if on_gpu else "cpu", options.length(seq_len or default_length, "--seq-len"), rows or default_rows,
        activation_checkpointing, dtype, on_gpu if compile is None else compile, steps or default_steps,
        warmup or default_warmup, longest, timeout_s,
    )  # fmt: skip
    show = {"environment": print_environment, "accuracy": print_check, "rows": print_row, "longest": print_row}

    def on_row(kind: str, row: dict, results: dict) -> None:
        show[kind](row)
        for file, write in ((json_file, write_json), (csv_file, write_csv)):
            if file is not None and results["environment"] and kind != "environment":
                write(results, file)

    folder = json_file.with_name(f"{json_file.name}.cases") if json_file is not None else None
    budget = Budget(max_minutes if max_minutes is not None else 60 if on_gpu else 5, log)
    results = bench_scaling(plan, log, on_row, folder, budget=budget)
    for line in summary(results["rows"]):
        print(line)
    if results["environment"]:
        options.write_outputs(results, (json_file, write_json), (csv_file, write_csv), (plot, plot_scaling))
    budget.close()
    wrong = [row for row in results["accuracy"] if not row.get("passed") and row["status"] != "skipped"]
    if wrong:
        raise RunError(f"{len(wrong)} of {len(results['accuracy'])} meshes failed their check, so not timed; see above")
    if not any(row["status"] == "ok" for row in results["rows"]):
        raise RunError("nothing could be timed; see above")


def _numbers(text: str | None, seen: int) -> list[int]:
    """Numbers of GPUs; 1 is always among them, since all are compared with it."""
    if text is None:
        return [2**power for power in range(seen.bit_length())]
    return sorted({1, *options.counts(text, "--gpus", "1,2,4")})


def _meshes(text: str | None, numbers: list[int]) -> list[str]:
    """The meshes to measure; by default all that fit one of the `numbers` of GPUs."""
    from tnllm.bench.scale import mesh_axes

    if numbers == [1]:
        if text:
            raise UserError(f"--meshes is {text}, but --gpus is 1; give the numbers of GPUs to compare, such as 1,2")
        return []
    if text:
        return [word.strip() for word in text.split(",")]
    return ["fsdp", "tp", "sp", *(mesh for mesh in _PRODUCTS if any(mesh_axes(mesh, number) for number in numbers))]
