"""A training run from start to end.

    train(load_recipe("tiny"), Path("runs/tiny"))
    train(config, Path("runs/tiny"), resume="auto")

A run folder holds config.resolved.yaml, env.json, metrics.jsonl, train.log, checkpoints/, latest and, at the end, weights/.
"""

from pathlib import Path

from tnllm.errors import UserError
from tnllm.parallel.mesh import Mesh
from tnllm.training.config import RunConfig
from tnllm.training.hooks import Scorer, make_hooks
from tnllm.training.run import finish, open_run
from tnllm.training.trainer import train_step


def train(
    config: RunConfig,
    out: Path,
    resume: str | None = None,
    mesh: Mesh | None = None,
    score: Scorer | None = None,
    outer_command: bool = False,
    allow_data_change: bool = False,
    force_unlock: bool = False,
) -> None:
    """Train `config` into the run folder `out`, as its only writer.

    `resume`: None starts a new run and refuses a folder that holds one; "auto" resumes from the newest complete
    checkpoint of `out`, or starts; a folder names the checkpoint, of `out` or of another run if `out` holds none. What a
    resume goes back behind moves to `out`/abandoned; one with other data needs `allow_data_change`. `force_unlock`: see
    `only_writer`. `mesh`: this process is one of its ranks, all of which make the same call. `score` scores eval.tasks
    (tnllm.evaluation.during_training). `outer_command`: training is a part of another command, so no message names an
    option of `tnllm train`. Raises UserError for input that does not fit, RunError for failures while running, Terminated
    (exit 143) and KeyboardInterrupt after a signal, each once everything is saved.
    """
    if config.eval.tasks and score is None and mesh is None:
        raise UserError("eval.tasks are set, and nothing to score them with was given; train with `tnllm train`")
    with open_run(config, out, resume, mesh, allow_data_change, None if outer_command else force_unlock) as run:
        state, signals, hooks = run.state, run.signals, make_hooks(run, score)
        total = run.trainer.config.total_steps  # known now, if it is given in epochs
        for hook in hooks:
            if hook.name in state.owed:
                hook.act()
        state.owed.clear()
        run.timer.restart()
        while state.step < total and not signals.stop:
            update = train_step(run.trainer, state, signals)
            if update is None:
                break
            run.add(update)
            stop, last = signals.stop is not None, state.step == total
            due = [hook for hook in hooks if hook.due(state.step, last or (stop and hook.quick))]
            if stop:
                state.owed = [hook.name for hook in due if not hook.quick]
                due = [hook for hook in due if hook.quick]
            for hook in due:
                hook.act()
            if due:
                run.timer.restart()
        finish(run, outer_command)
