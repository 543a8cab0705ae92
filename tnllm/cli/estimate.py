"""`tnllm estimate`: what a recipe costs in memory, FLOPs and days, before anything starts."""

from typing import Any

import typer

from tnllm.cli.options import RECIPE, SETS, examples
from tnllm.errors import UserError

EPILOG = examples("tnllm estimate 1b --gpu h100 --mfu 0.45")


def command(
    recipe: str = RECIPE,
    sets: list[str] = SETS,
    gpu: str | None = typer.Option(None, help="Does a rank fit? h200, h100, a100-80g, a100-40g, l40s or rtx4090."),
    memory_gib: float | None = typer.Option(None, help="Say whether a rank fits into this many GiB."),
    seq_len: int | None = typer.Option(None, help="Another row length; rows per pass change so that tokens stay."),
    tokens_per_s: float | None = typer.Option(None, help="Give the time at this many tokens/s over all ranks."),
    mfu: float | None = typer.Option(None, help="Give the time at this share of --gpu's bf16 peak, such as 0.4."),
    gpus: int | None = typer.Option(None, help="With --mfu: this many GPUs instead of the recipe's ranks."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON; memory in GiB."),
) -> None:
    """Estimate parameters, memory of a rank, decoding state, FLOPs and days. Computed, not measured."""
    import json

    from tnllm.training.config import fit_rows, load_recipe
    from tnllm.training.estimate import estimate, settings_at_length
    from tnllm.training.loaders import planned

    _check(gpu, memory_gib=memory_gib, seq_len=seq_len, tokens_per_s=tokens_per_s, mfu=mfu, gpus=gpus)
    if not any(item.partition("=")[0].strip() == "train.micro_batch_size" for item in sets):
        sets = [*sets, *fit_rows(recipe, sets)]
    config = load_recipe(recipe, sets)
    if seq_len is not None:
        config = load_recipe(
            recipe, [*sets, *settings_at_length(config.train, config.data.seq_len, config.parallel.data_ranks, seq_len)]
        )
    answer = estimate(planned(config), gpu, memory_gib, tokens_per_s, mfu, gpus)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        _print(recipe, answer)


def _check(gpu: str | None, **numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    mfu = numbers["mfu"]
    if mfu is not None and (gpu is None or mfu > 1):
        raise UserError(f"--mfu is {mfu}; it must lie in (0, 1] and is a share of --gpu's peak, so give --gpu too")


_PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "AdamW's two moments, fp32",
    "casts": "bf16 copies, or unsharded weights",
    "activations": "activations",
    "head": "head and loss",
    "total": "total",
}


def _print(recipe: str, answer: dict[str, Any]) -> None:
    from tnllm.files import format_bytes, format_count, format_duration
    from tnllm.progress import log
    from tnllm.tables import print_table

    rank = answer["rank_gib"]
    rows = [[label, *(format_bytes(rank[mode][key] * 2**30) for mode in rank)] for key, label in _PARTS.items()]
    for name, fits in answer["fits"].items():
        rows.append([f"fits {name}", *("yes" if fits[mode] else "no" for mode in rank)])
    rows.append(["FLOPs computed again", *(f"{answer['again'][mode]:.1%}" for mode in rank)])
    mesh = "one rank" if answer["ranks"] == 1 else f"each of {answer['ranks']} ranks"
    title = (
        f"{recipe}: {format_count(answer['parameters'])} parameters; {mesh}, "
        f"{answer['rows_per_pass']} x {answer['seq_len']} tokens a pass"
    )
    print_table(["memory", *rank], rows, right=rank, title=title)
    log(
        f"columns: train.activation_checkpointing, which the recipe sets to {answer['activation_checkpointing']}; "
        f"computed, not measured; to fit, {answer['reserve']:.0%} of a card stays free for what is not counted"
    )
    per_s = answer["tokens_per_s"]
    grows = f" at {answer['seq_len']} tokens" if answer["softmax_layers"] else ", at any length"
    time = "give --tokens-per-s, or --gpu and --mfu"
    if per_s is not None:
        time = f"{format_duration(answer['days'] * 86400)} at {format_count(per_s)} tokens/s"
    work = [
        ["decoding state of a sequence", format_bytes(answer["state_gib"] * 2**30) + grows],
        ["training FLOPs per token", format_count(answer["flops_per_token"])],
        ["tokens", format_count(answer["tokens"])],
        ["training FLOPs", f"{answer['flops']:.3g}"],
        ["time", time],
    ]
    print_table(["", ""], work)
