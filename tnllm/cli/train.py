"""`tnllm train`: pretrain or continue a model from a recipe."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tnllm.cli.options import RECIPE, SETS, examples
from tnllm.files import check_output_folder
from tnllm.progress import log

if TYPE_CHECKING:
    from tnllm.training.config import RunConfig
    from tnllm.training.sections import EvalSection

EPILOG = examples(
    "tnllm train recipes/tiny.yaml --set train.max_steps=50 --out runs/short",
    "tnllm train 385m --nproc 8",
    "torchrun --nproc-per-node 8 -m tnllm train 385m",
)


def command(
    recipe: str = RECIPE,
    sets: list[str] = SETS,
    out: Path | None = typer.Option(None, help="Run folder. Default: runs/<recipe name>."),
    init: str | None = typer.Option(
        None, help="Start from these weights: a weights or run folder, hf://ORG/NAME, or `packaged`; sets train.init."
    ),
    resume: str | None = typer.Option(None, help="auto, a run folder or a step folder."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or cuda:N; overrides train.device."),
    nproc: int = typer.Option(1, min=1, help="Ranks on this machine, one per GPU; on several machines use torchrun."),
    max_restarts: int = typer.Option(0, min=0, help="With --nproc: start again after a lost rank, this many times."),
    allow_data_change: bool = typer.Option(
        False,
        "--allow-data-change",
        help="Resume although data, seed or row length changed; says where reading starts.",
    ),
    force_unlock: bool = typer.Option(False, "--force-unlock", help="Ignore the lock that another machine left there."),
    profile: bool = typer.Option(False, "--profile", help="Profile three steps into profile/ (log.profile_steps)."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan and stop; nothing is allocated."),
    world_size: int | None = typer.Option(None, min=1, help="With --dry-run: plan for this many ranks."),
) -> None:
    """Train a model from a recipe, on a CPU, one GPU or many."""
    # Read when tqdm is first imported; the harness behind eval.tasks would draw its bars into the log.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from tnllm.errors import Terminated, UserError
    from tnllm.parallel.mesh import launched
    from tnllm.parallel.ranks import SharedError
    from tnllm.training.config import load_recipe
    from tnllm.training.launch import fit_mesh, launch

    if world_size is not None and not dry_run:
        raise UserError("--world-size is for --dry-run; to train on several ranks give --nproc, or start torchrun")
    flags = {"train.device": device, "train.init": init, "log.profile_steps": 3 if profile else None}
    sets = [*sets, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    out = out or Path("runs") / Path(recipe).stem
    if not dry_run:
        check_output_folder(out, "--out")
    is_rank = launched() and not dry_run
    try:
        config = load_recipe(recipe, sets)
        asked = world_size or (config.parallel.num_ranks if dry_run else nproc)
        ranks = int(os.environ["WORLD_SIZE"]) if is_rank else asked
        rows, micro = config.global_batch_rows, config.train.micro_batch_size
        sets += [f"{key}={size}" for key, size in fit_mesh(config.parallel, rows, micro, ranks).items()]
        config = load_recipe(recipe, sets)
        if dry_run:
            from tnllm.training.dry_run import dry_run_text

            print(dry_run_text(config))
        elif nproc > 1 and not is_rank:
            options = [word for item in sets for word in ("--set", item)] + (["--resume", resume] if resume else [])
            options += ["--allow-data-change"] * allow_data_change + ["--force-unlock"] * force_unlock
            code = launch(["train", recipe, *options, "--out", str(out)], nproc, max_restarts)
            if code:
                raise typer.Exit(code)
        else:
            how = {"resume": resume, "allow_data_change": allow_data_change, "force_unlock": force_unlock}
            _train(config, out, is_rank, how)
    except (UserError, KeyboardInterrupt) as error:
        # An error that every rank raises is printed by the first only.
        shared = isinstance(error, SharedError | Terminated | KeyboardInterrupt) or type(error) is UserError
        if is_rank and os.environ["RANK"] != "0" and shared:
            raise typer.Exit(getattr(error, "exit_code", 130)) from None
        raise


def scorer(section: "EvalSection", template: str) -> Any:
    """Returns the scorer of eval.tasks, which prompts with `template`. Raises for unknown names and missing data."""
    from tnllm.cli.evaluation_view import quiet_libraries

    log("eval.tasks: reading the questions")
    quiet_libraries(list(section.tasks), online=False)
    from tnllm.evaluation.during_training import task_scorer

    return task_scorer(section.tasks, section.tasks_limit, section.tasks_data_dir, log, template)


def _train(config: "RunConfig", out: Path, is_rank: bool, how: dict[str, Any]) -> None:
    import torch

    from tnllm.errors import RunError
    from tnllm.training.launch import train_on_mesh
    from tnllm.training.loop import train

    try:
        if is_rank and config.parallel.num_ranks > 1:
            train_on_mesh(config, out, **how)
        else:
            score = scorer(config.eval, config.prompt_template) if config.eval.tasks else None
            train(config, out, score=score, **how)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the GPU is out of memory with train.micro_batch_size {config.train.micro_batch_size}; halve it, or set "
            "train.activation_checkpointing=selective or full, and resume with --resume auto"
        ) from error
