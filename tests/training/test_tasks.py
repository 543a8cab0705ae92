"""Tasks of lm-evaluation-harness scored while a model trains."""

import os

import pytest

os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

from tnllm.errors import UserError
from tnllm.evaluation.during_training import task_scorer
from tnllm.evaluation.harness import TransNormerLM
from tnllm.evaluation.run import Settings, evaluate
from tnllm.evaluation.tasks import choose, load_tasks
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics

TASKS = ["piqa", "openbookqa"]


@pytest.mark.slow
def test_scores_are_rows_and_change_nothing_of_the_run(recipe, tmp_path):
    keys = ["train.max_steps=6", "eval.tasks=[piqa, openbookqa]", "eval.tasks_every_steps=4", "eval.tasks_limit=3"]
    train(load_recipe(str(recipe), keys), tmp_path / "run", score=task_scorer(TASKS, 3))
    train(load_recipe(str(recipe), keys[:1]), tmp_path / "plain")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scores = [row for row in rows if "tasks/piqa/acc" in row]
    assert [row["step"] for row in scores] == [4, 6]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == [row["loss"] for row in read_metrics(tmp_path / "plain" / "metrics.jsonl") if "loss" in row]
    assert "step  6/20" not in (log := (tmp_path / "run" / "train.log").read_text()) and "step 6/6  piqa/acc " in log
    # The last scores are those of the weights that were written.
    loaded = load_tasks(choose(TASKS, None, print), None, False, print)
    lm = TransNormerLM(tmp_path / "run", device="cpu", dtype="float32")
    found = evaluate(lm, loaded, Settings(limit=3))["results"]
    for task in TASKS:
        assert scores[-1][f"tasks/{task}/acc"] == found[task]["acc,none"]


def test_bad_tasks_are_told_before_training(recipe, tmp_path):
    with pytest.raises(UserError, match="did you mean 'piqa'"):
        task_scorer(["piqua"])
    with pytest.raises(UserError, match=r"eval.tasks: no data for sciq .* --set eval.tasks_data_dir=DIR"):
        task_scorer(["sciq"])
    with pytest.raises(UserError, match=r"eval.tasks_data_dir /no is not a folder"):
        task_scorer(["piqa"], data_dir="/no")
    with pytest.raises(UserError, match="train with `tnllm train`"):
        train(load_recipe(str(recipe), ["eval.tasks=piqa"]), tmp_path / "run")
