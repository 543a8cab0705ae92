"""`tnllm bench-scale`: training on 1, 2, 4 … GPUs of this machine, by mesh: correctness first, then speed and memory."""

import sys
from pathlib import Path

import typer

from tnllm.cli.lengths import length
from tnllm.cli.outputs import check_outputs
from tnllm.errors import UserError

EPILOG = (
    "Example:  tnllm bench-scale --preset 385m,1b --gpus 1,2 --meshes fsdp,tp,sp --json scale.json --plot scale.png"
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
    timeout_s: float = typer.Option(300, min=1, help="A case from which nothing is heard for so long is given up."),
    device: str = typer.Option("auto", help="auto, cuda or cpu."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every figure as JSON, anew after each row."),
    csv_file: Path | None = typer.Option(None, "--csv", help="Write the rows as CSV, anew after each row."),
    plot: Path | None = typer.Option(None, "--plot", help="Write a chart (png, svg or pdf)."),
) -> None:
    """Train on 1, 2, 4 … GPUs: check each mesh against one GPU, then tokens/s, efficiency, memory and communication."""
    for flag, value, allowed in (
        ("--device", device, ("auto", "cuda", "cpu")),
        ("--dtype", dtype, ("auto", "bf16", "fp32")),
        ("--activation-checkpointing", activation_checkpointing, ("none", "selective", "full")),
    ):
        if value not in allowed:
            raise UserError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}")
    check_outputs(json_file, csv_file, plot=plot)
    import torch

    from tnllm.bench.report import write_csv, write_json
    from tnllm.bench.scale import Plan, bench_scaling, mesh_axes
    from tnllm.bench.scale_report import plot_scaling, print_check, print_environment, print_row, summary
    from tnllm.errors import RunError

    # Only counted: a process that touched a GPU would keep memory of it from the ranks.
    seen = torch.cuda.device_count()
    if device == "cuda" and not seen:
        raise UserError("--device is 'cuda', but torch sees no CUDA device; run tnllm doctor")
    on_gpu = seen > 0 and device != "cpu"
    default_preset, default_length, default_rows, default_steps, default_warmup = _GPU if on_gpu else _CPU
    if not on_gpu:
        _note("no GPU in use: processes of this CPU in their place, which say nothing about GPUs; expect about 30 s")
        if longest:
            raise UserError("--longest looks for the end of a GPU's memory; it does not go with a CPU")
    numbers = _numbers(gpus, seen) if on_gpu or gpus else [1, 2]
    if on_gpu and max(numbers) > seen:
        raise UserError(f"--gpus is {gpus}, but torch sees {seen}; give at most that many")
    names = [word.strip() for word in meshes.split(",")] if meshes else ["fsdp", "tp", "sp"]
    if not meshes:
        names += [mesh for mesh in _PRODUCTS if any(mesh_axes(mesh, number) for number in numbers)]
    if numbers == [1]:
        if meshes:
            raise UserError(f"--meshes is {meshes}, but --gpus is 1; give the numbers of GPUs to compare, such as 1,2")
        names = []
    plan = Plan(
        [name.strip() for name in (preset or default_preset).split(",")],
        numbers,
        names,
        "cuda" if on_gpu else "cpu",
        length(seq_len or default_length, "--seq-len"),
        rows or default_rows,
        activation_checkpointing,
        dtype,
        on_gpu if compile is None else compile,
        steps or default_steps,
        warmup or default_warmup,
        longest,
        timeout_s,
    )

    def on_row(row: dict, results: dict) -> None:
        print_row(row)
        save(results)

    def on_check(row: dict, results: dict) -> None:
        print_check(row)
        save(results)

    def save(results: dict) -> None:
        for file, write in ((json_file, write_json), (csv_file, write_csv)):
            if file is not None and results["environment"]:
                write(results, file)

    results = bench_scaling(plan, _note, print_environment, on_check, on_row)
    for line in summary(results["rows"]):
        print(line)
    save(results)
    if plot is not None:
        plot_scaling(results, plot)
    for file in (json_file, csv_file, plot):
        if file is not None:
            _note(f"wrote {file}")
    wrong = [row for row in results["accuracy"] if not row.get("passed")]
    if wrong:
        raise RunError(
            f"{len(wrong)} of {len(results['accuracy'])} meshes failed their check and were not timed; see above"
        )
    if not any(row["status"] == "ok" for row in results["rows"]):
        raise RunError("nothing could be timed; see above")


def _numbers(text: str | None, seen: int) -> list[int]:
    """`1,2,4`; one GPU is always among them, as all are compared with it."""
    if text is None:
        return [2**power for power in range(seen.bit_length())]
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--gpus is {text!r}; write numbers of GPUs such as 1,2,4")
    return sorted({1, *map(int, words)})


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
