"""`tnllm train`: pretrain or continue a model from a recipe."""

from pathlib import Path

import typer

EPILOG = "Example:  tnllm train recipes/tiny.yaml --set train.max_steps=50 --out runs/short"


def command(
    recipe: str = typer.Argument(..., help="A recipe file, or the name of a packaged one (`tnllm recipes list`)."),
    sets: list[str] = typer.Option([], "--set", help="Override a key: --set train.max_steps=50. Repeatable."),
    out: Path | None = typer.Option(None, help="Run folder. Default: runs/<recipe name>."),
    init: str | None = typer.Option(
        None, help="Start from these weights: a weights folder, a run folder, or `packaged`; sets train.init."
    ),
    resume: str | None = typer.Option(None, help="auto, a run folder or a step folder."),
    device: str | None = typer.Option(None, help="auto, cpu or cuda; overrides train.device."),
    nproc: int = typer.Option(1, help="Processes on this machine. This version trains on one device."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan and stop; nothing is allocated."),
) -> None:
    """Train a model from a recipe, on a CPU or one GPU."""
    from tnllm.errors import RunError, UserError
    from tnllm.training.config import load_recipe

    if nproc != 1:
        raise UserError(f"--nproc is {nproc}; this version trains on one device, so only 1 is allowed")
    flags = {"train.device": device, "train.init": init}
    config = load_recipe(recipe, [*sets, *(f"{key}={value}" for key, value in flags.items() if value is not None)])
    if config.world_size != 1:
        raise UserError(
            f"the recipe's parallel section asks for {config.world_size} ranks; this version trains on one device: "
            "set replicate, shard, sequence and tensor to 1"
        )
    out = out or Path("runs") / Path(recipe).stem
    if dry_run:
        from tnllm.training.plan import plan

        print(plan(config))
        return
    import torch

    from tnllm.training.loop import train

    try:
        train(config, out, resume)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the GPU is out of memory with train.micro_batch_size {config.train.micro_batch_size}; halve it, or set "
            "train.activation_checkpointing=full, and go on with --resume auto"
        ) from error
