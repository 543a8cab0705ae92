"""Questions of multiple-choice tasks as token requests, without a model: to count tokens, or to score without the harness.

bundle = build_bundle(loaded, Tokenizer.load(folder), limit=None, seed=1234)
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from tnllm.errors import UserError
from tnllm.evaluation.prompt_encoding import LineEncoder, encode_pairs
from tnllm.evaluation.request_file import Bundle
from tnllm.evaluation.tasks import Loaded
from tnllm.generation.prefix_tree import Request
from tnllm.tokenizer import Tokenizer


def ask(loaded: Loaded, limit: int | None, seed: int) -> Iterator[tuple[Task, list[Instance]]]:
    """Yield the task and the requests of each question. Raises UserError for tasks that are not multiple-choice."""
    for name, task in loaded.tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"{name} is a {task.OUTPUT_TYPE} task; this works with multiple-choice tasks only")
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=limit)
        ordered = sorted(task.instances, key=lambda each: (each.doc_id, each.idx))
        for _, instances in groupby(ordered, key=lambda each: each.doc_id):
            yield task, list(instances)


def build_bundle(loaded: Loaded, tokenizer: Tokenizer, limit: int | None, seed: int) -> Bundle:
    """Return the token requests of all questions. Raises UserError as `ask` does."""
    pairs: list[tuple[str, str]] = []
    questions: list[int] = []
    answers: list[int] = []
    for number, (task, instances) in enumerate(ask(loaded, limit, seed)):
        answers.append(_answer(task, instances[0].doc))
        pairs += [instance.args for instance in instances]
        questions += [number] * len(instances)
    requests: list[Request] = encode_pairs(pairs, LineEncoder(tokenizer), tokenizer.bos_id)
    about = {"tasks": list(loaded.tasks), "tokenizer_sha256": tokenizer.sha256, "limit": limit, "seed": seed}
    return Bundle(requests, questions, answers, about)


def _answer(task: Any, document: dict[str, Any]) -> int:
    # WinoGrande's choices are contexts, so its `doc_to_text` is the index of the right one.
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(target, str) and target.isdecimal():
        return int(target)
    return target if isinstance(target, int) else -1
