"""Scores of tasks for a model that is being trained.

    score = task_scorer(["arc_easy", "sciq"], limit=200, data_dir="sets", log=print)    # raises for a bad name
    score(model, tokenizer)                        # {"tasks/arc_easy/acc": 0.31, "tasks/arc_easy/acc_stderr": 0.03, ...}

The model is scored in the dtype of its weights. Scoring changes nothing in the run: the states of its random generators are
restored.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from tnllm.chat_template import DEFAULT
from tnllm.errors import UserError
from tnllm.evaluation.harness import TransNormerLM
from tnllm.evaluation.run import Settings, evaluate
from tnllm.evaluation.tasks import choose, load_tasks
from tnllm.generation.loading import LoadedModel
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import GENERATION_DEFAULTS
from tnllm.tokenizer import Tokenizer

Scores = dict[str, float]


def task_scorer(
    tasks: Sequence[str],
    limit: float | None = None,
    data_dir: str | None = None,
    log: Callable[[str], None] = lambda text: None,
    chat_template: str = DEFAULT,
) -> Callable[[LanguageModel, Tokenizer], Scores]:
    """Return a function that scores a model on `tasks`, with each task's own number of examples.

    `tnllm eval ls` lists names and data. `limit`: questions of each task, or a share below 1. Raises UserError for an
    unknown task or missing data.
    """
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise UserError(f"eval.tasks_data_dir {data_dir} is not a folder; `tnllm eval ls` says what it may hold")
    settings = Settings(limit)
    choices = choose(tasks, None, log)
    try:
        load_tasks(choices, folder, False, log)
    except UserError as error:
        advice = str(error).replace("--data-dir DIR", "--set eval.tasks_data_dir=DIR")
        raise UserError(f"eval.tasks: {advice.removesuffix(', or --online to download it')}") from None

    def score(model: LanguageModel, tokenizer: Tokenizer) -> Scores:
        # As in the weights that the run publishes, so that `tnllm eval` gives the same texts.
        sampling = {key: GENERATION_DEFAULTS[key] for key in ("temperature", "top_p", "repetition_penalty")}
        about = sampling, (tokenizer.eos_id,), tokenizer.bos_id, False, chat_template
        states = random.getstate(), np.random.get_state()
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                # Tasks keep their requests, so they are loaded again each time.
                loaded = load_tasks(choices, folder, False, lambda text: None)
                results = evaluate(
                    TransNormerLM(LoadedModel(Path("training"), model, tokenizer, *about)), loaded, settings
                )
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        assert results is not None, "only one rank scores tasks"
        # The members of a group are in the group's row.
        members = {name for group in loaded.groups.values() for name in group.child_names}
        return {
            f"tasks/{task}/{key.removesuffix(',none').replace(',', '-')}": float(value)
            for task, row in results["results"].items()
            if task not in members
            for key, value in row.items()
            if isinstance(value, int | float) and "," in key
        }

    return score
