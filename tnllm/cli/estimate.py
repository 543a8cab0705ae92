"""`tnllm estimate`: what a recipe costs in memory, work and days, before anything is started."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from tnllm.errors import UserError

if TYPE_CHECKING:
    from tnllm.training.config import RunConfig

EPILOG = "Example:  tnllm estimate 1b --gpu h100 --mfu 0.45"


def command(
    recipe: str = typer.Argument(help="A recipe file, or the name of one that ships."),
    sets: list[str] = typer.Option([], "--set", help="Change a key: section.key=value. May be repeated."),
    gpu: str | None = typer.Option(
        None, help="Say whether a rank fits: h200, h100, a100-80g, a100-40g, l40s, rtx4090."
    ),
    memory_gib: float | None = typer.Option(None, help="Say whether a rank fits into this many GiB."),
    seq_len: int | None = typer.Option(None, help="Another row length; rows per pass change so that tokens stay."),
    tokens_per_s: float | None = typer.Option(None, help="Give the time at this many tokens/s over all ranks."),
    mfu: float | None = typer.Option(None, help="Give the time at this share of --gpu's bf16 peak, such as 0.4."),
    gpus: int | None = typer.Option(None, help="With --mfu: this many GPUs instead of the recipe's ranks."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON; memory in GiB."),
) -> None:
    """Estimate parameters, memory of a rank, decoding state, FLOPs and days. Computed, not measured."""
    import json

    from tnllm.training.config import load_recipe

    config = load_recipe(recipe, sets)
    if seq_len is not None:
        config = load_recipe(recipe, [*sets, *_at_length(config, seq_len)])
    answer = _estimate(config, gpu, memory_gib, tokens_per_s, mfu, gpus)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        _print(recipe, config, answer)


def _at_length(config: "RunConfig", seq_len: int) -> list[str]:
    """Settings for rows of `seq_len` tokens with as many tokens in a pass, and in a step, as before."""
    if seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; it must be at least 1")
    rows = max(1, config.train.micro_batch_size * config.data.seq_len // seq_len)
    unit = rows * seq_len * config.data_ranks
    batch = -(-config.train.global_batch_tokens // unit) * unit
    return [f"data.seq_len={seq_len}", f"train.micro_batch_size={rows}", f"train.global_batch_tokens={batch}"]


def _estimate(
    config: "RunConfig",
    gpu: str | None,
    memory_gib: float | None,
    tokens_per_s: float | None,
    mfu: float | None,
    gpus: int | None,
) -> dict[str, Any]:
    from tnllm.training.estimate import GPUS, RESERVE, estimate_cost, estimate_memory, find_gpu

    card = find_gpu(gpu) if gpu else None
    if mfu is not None and (card is None or not 0 < mfu <= 1):
        raise UserError(f"--mfu is {mfu}; it must lie in (0, 1] and is a share of --gpu's peak, so give --gpu too")
    for flag, value in (("--tokens-per-s", tokens_per_s), ("--memory-gib", memory_gib), ("--gpus", gpus)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag} is {value}; it must be above 0")
    cost = estimate_cost(config, card, mfu, tokens_per_s, gpus)
    rank: dict[str, dict[str, float]] = {}
    for mode in ("none", "full"):
        memory = estimate_memory(config, mode)
        rank[mode] = {**{key: value / 2**30 for key, value in asdict(memory).items()}, "total": memory.total / 2**30}
    sizes = {name: known.memory_gib for name, known in GPUS.items()}
    if card is not None:
        sizes = {str(gpu): card.memory_gib}
    if memory_gib is not None:
        sizes = {f"{memory_gib:g} GiB": memory_gib}
    return {
        "parameters": cost.parameters,
        "ranks": config.world_size,
        "rows_per_pass": config.train.micro_batch_size,
        "seq_len": config.data.seq_len,
        "rank_gib": rank,
        "activation_checkpointing": config.train.activation_checkpointing,
        "reserve": RESERVE,
        "fits": {
            name: {mode: rank[mode]["total"] <= size * (1 - RESERVE) for mode in rank} for name, size in sizes.items()
        },
        "state_gib": cost.state_bytes / 2**30,
        "flops_per_token": cost.flops_per_token,
        "tokens": cost.tokens,
        "flops": cost.flops,
        "tokens_per_s": cost.tokens_per_s,
        "days": None if cost.seconds is None else cost.seconds / 86400,
    }


_PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "AdamW's two moments, fp32",
    "casts": "bf16 copies of the weights",
    "activations": "activations",
    "head": "head and loss",
    "total": "total",
}


def _print(recipe: str, config: "RunConfig", answer: dict[str, Any]) -> None:
    from tnllm.cli.tables import print_table
    from tnllm.files import format_bytes, format_count, format_duration

    rank = answer["rank_gib"]
    rows = [[label, *(format_bytes(rank[mode][key] * 2**30) for mode in rank)] for key, label in _PARTS.items()]
    for name, fits in answer["fits"].items():
        rows.append([f"fits {name}", *("yes" if fits[mode] else "no" for mode in rank)])
    mesh = "one rank" if answer["ranks"] == 1 else f"each of {answer['ranks']} ranks"
    print_table(
        f"{recipe}: {format_count(answer['parameters'])} parameters; {mesh}, "
        f"{answer['rows_per_pass']} x {answer['seq_len']} tokens a pass",
        ["memory", "all activations kept", "recomputed"],
        rows,
        right=["all activations kept", "recomputed"],
        note=f"The recipe sets train.activation_checkpointing {answer['activation_checkpointing']}. Computed, not "
        f"measured; to fit, {answer['reserve']:.0%} of a card stays free for what is not counted.",
    )
    per_s = answer["tokens_per_s"]
    grows = f" at {answer['seq_len']} tokens" if config.model.kind == "transformer" else ", at any length"
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
    print_table("", ["", ""], work)
