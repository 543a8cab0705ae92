"""`tnllm bench-train`: full training steps, TransNormerLLM beside the softmax Transformer, by length."""

from pathlib import Path

import typer

from tnllm.cli import options
from tnllm.errors import RunError, UserError
from tnllm.progress import log

EPILOG = options.examples("tnllm bench-train --preset 385m --seqlens 1k:64k --json training.json --plot training.png")

# Preset, lengths, tokens in a step, timed steps.
_GPU = ("385m", "1k:64k", "32k", 10)
_CPU = ("tiny", "256:1k", "2k", 3)
_KINDS = ("transnormer", "transformer")


def command(
    preset: str | None = typer.Option(None, help="Sizes: 385m, or 385m,1b,7b. Default 385m on a GPU, tiny on CPU."),
    softmax_every: int = options.SOFTMAX_EVERY,
    seqlens: str | None = typer.Option(None, help="Lengths: 2k,8k, or 1k:128k for every doubling."),
    tokens_per_batch: str | None = typer.Option(None, help="Tokens of a step. Default 32k on a GPU, 2k on CPU."),
    batch: int | None = typer.Option(None, min=1, help="Rows in a step at every length, instead of the above."),
    kinds: str = typer.Option(",".join(_KINDS), help="transnormer, transformer or both."),
    same: str = typer.Option("width", help="What the Transformer shares: width (6 % fewer parameters) or parameters."),
    packing: str = typer.Option("concat", help="concat: plain rows. reset: every row a document, packed."),
    activation_checkpointing: str = typer.Option("none", help="none, selective, full, or several of them: none,full."),
    compile: bool | None = typer.Option(None, help="torch.compile. Default: on a GPU."),
    dtype: str = typer.Option("auto", help="auto (bf16 on a GPU, fp32 on CPU), bf16 or fp32; the compute type."),
    weights: str = typer.Option("fp32", help="fp32; or bf16: weights and moments kept in 8 bytes instead of 16."),
    steps: int | None = typer.Option(None, min=1, help="Steps timed. Default 10 on a GPU, 3 on CPU."),
    warmup: int | None = typer.Option(None, min=0, help="Steps before, after the first. Default 3 on a GPU, 1 on CPU."),
    max_minutes: float | None = options.MAX_MINUTES,
    device: str = options.DEVICE,
    json_file: Path | None = options.JSON_FILE,
    csv_file: Path | None = options.CSV_FILE,
    plot: Path | None = options.PLOT,
) -> None:
    """Check the training step, then time it: tokens/s, FLOP utilisation and memory by size, length and batch."""
    options.check_choice("--dtype", dtype, ("auto", "bf16", "fp32"))
    options.check_choice("--weights", weights, ("fp32", "bf16"))
    options.check_choice("--packing", packing, ("concat", "reset"))
    options.check_choice("--same", same, ("width", "parameters"))
    if batch is not None and tokens_per_batch is not None:
        raise UserError("both --batch and --tokens-per-batch are given; use one of them")
    chosen = options.choices(kinds, "--kinds", _KINDS)
    modes = options.choices(activation_checkpointing, "--activation-checkpointing", ("none", "selective", "full"))
    tokens = options.length(tokens_per_batch, "--tokens-per-batch") if tokens_per_batch else None
    chosen_lengths = options.lengths(seqlens, "--seqlens") if seqlens else None
    options.check_outputs(json_file, csv_file, plot=plot)
    from tnllm.bench.budget import Budget
    from tnllm.bench.report import write_csv, write_json
    from tnllm.bench.tables import compare_training, plot_training, print_training_head, print_training_row
    from tnllm.bench.train import Case, bench_training
    from tnllm.device import pick_device

    where = pick_device(device, "--device")
    on_gpu = where.type == "cuda"
    default_preset, default_lengths, default_tokens, default_steps = _GPU if on_gpu else _CPU
    if not on_gpu:
        log("no GPU in use: small sizes, whose figures say nothing about a GPU; expect up to a minute")
    chosen_lengths = chosen_lengths or options.lengths(default_lengths, "--seqlens")
    tokens = tokens or options.length(default_tokens, "--tokens-per-batch")
    cases = [
        Case(name.strip(), kind, count, batch or max(1, tokens // count), mode, packing, same, weights, softmax_every)
        for name in (preset or default_preset).split(",")
        for mode in modes
        for count in chosen_lengths
        for kind in chosen
    ]
    for case in cases:
        _ = case.model  # raises for an unknown preset, before anything is measured

    def on_row(row: dict, results: dict) -> None:
        print_training_row(row)
        if json_file is not None:
            write_json(results, json_file)

    budget = Budget(max_minutes if max_minutes is not None else 60 if on_gpu else 1, log)
    results = bench_training(
        cases, where, dtype, on_gpu if compile is None else compile, steps or default_steps,
        (3 if on_gpu else 1) if warmup is None else warmup, log, print_training_head, on_row, budget,
    )  # fmt: skip
    for line in compare_training(results["rows"]):
        print(line)
    options.write_outputs(results, (json_file, write_json), (csv_file, write_csv), (plot, plot_training))
    budget.close()
    if not all(row["passed"] for row in results["accuracy"]):
        raise RunError("a kind failed its check and was not timed; see above")
