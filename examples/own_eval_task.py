"""A task of your own for lm-evaluation-harness, scored on a model: python examples/own_eval_task.py [MODEL]"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from tnllm.evaluation.harness import TransNormerLM

folder = Path("own-task")
folder.mkdir(exist_ok=True)
questions = [
    {"question": "The opposite of hot is", "choices": ["cold", "tall", "green"], "answer": 0},
    {"question": "Two and two make", "choices": ["nine", "four", "a horse"], "answer": 1},
    {"question": "At night one sees the", "choices": ["noon", "sun", "moon"], "answer": 2},
]
(folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
(folder / "opposites.yaml").write_text(
    f"""\
task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
    encoding="utf-8",
)
# No model named: the one that ships.
model = TransNormerLM(pretrained=sys.argv[1]) if len(sys.argv) > 1 else TransNormerLM()
tasks = TaskManager(include_path=[str(folder)], include_defaults=False)
results = lm_eval.simple_evaluate(model=model, tasks=["opposites"], task_manager=tasks, bootstrap_iters=0)
print(json.dumps(results["results"]["opposites"], default=str, indent=1))
