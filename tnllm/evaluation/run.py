"""One evaluation: tasks run by the harness, results in its file format.

results = evaluate(lm, loaded, settings)
path = write_results(Path("evals"), results, log_samples=True)   # evals/MODEL/results_DATE.json, samples_TASK_DATE.jsonl
"""

import json
import platform
import random
import re
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.utils import handle_non_serializable, hash_string

from tnllm import __version__
from tnllm.errors import UserError
from tnllm.evaluation.harness import TransNormerLM
from tnllm.evaluation.tasks import Loaded
from tnllm.files import write_text_atomic

# Bootstrap draws for the standard errors of metrics without a formula; means have one.
BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class Settings:
    """Settings of prompts and metrics, besides the tasks."""

    limit: float | None = None  # questions of each task, or a share below 1
    seed: int = 1234
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    log_samples: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise UserError(f"--limit is {self.limit:g}; give a number of questions from 1, or a share between 0 and 1")


def evaluate(lm: TransNormerLM, loaded: Loaded, settings: Settings) -> dict[str, Any] | None:
    """Run all tasks. Returns results like the harness's `simple_evaluate` with a key `tnllm`; None on ranks above 0."""
    started, clock = time.time(), time.perf_counter()
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(seed=settings.seed)
        if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=settings.gen_kwargs, update=True)
    # For the harness a share of exactly 1 means one question.
    limit = None if settings.limit is None else (int(settings.limit) if settings.limit >= 1 else settings.limit)
    results = evaluator.evaluate(
        lm, loaded.as_harness(), limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=True,
        system_instruction=settings.system_instruction, apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
    )  # fmt: skip
    parts = lm.gather_object(lm.counts())
    if results is None or parts is None:
        return None
    totals = {key: (max if key == "longest_tokens" else sum)(part[key] for part in parts) for key in parts[0]}
    seconds = time.perf_counter() - clock
    name = str(lm.ready.folder)
    template = lm.chat_template(settings.chat_template)
    for row in (row for rows in results["samples"].values() for row in rows) if template else ():
        row["arguments"] = [
            tuple(lm.shown(value) if isinstance(value, str) else value for value in args) for args in row["arguments"]
        ]
    results = dict(results)
    results["config"] = {
        "model": "tnllm", "model_args": {"pretrained": name, "dtype": lm.get_model_info()["model_dtype"]},
        **lm.get_model_info(), "batch_size": "auto", "batch_sizes": [], "device": str(lm.device), "use_cache": None,
        "limit": settings.limit, "bootstrap_iters": BOOTSTRAP_DRAWS, "gen_kwargs": settings.gen_kwargs,
        "random_seed": settings.seed, "numpy_seed": settings.seed, "torch_seed": settings.seed,
        "fewshot_seed": settings.seed,
    }  # fmt: skip
    results |= {
        "git_hash": None, "date": started, "lm_eval_version": version("lm_eval"), "transformers_version": None,
        "pretty_env_info": f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        "upper_git_hash": None, "task_hashes": _task_hashes(results["samples"]), "model_source": "tnllm",
        "model_name": name, "model_name_sanitized": _file_name(name), "system_instruction": settings.system_instruction,
        "system_instruction_sha": hash_string(settings.system_instruction) if settings.system_instruction else None,
        "fewshot_as_multiturn": settings.fewshot_as_multiturn, "chat_template": template,
        "chat_template_sha": hash_string(template) if template else None, "start_time": started,
        "end_time": time.time(), "total_evaluation_time_seconds": str(seconds),
    }  # fmt: skip
    results["tnllm"] = {
        "version": __version__, "weights_sha256": lm.weights_sha256, "tokenizer_sha256": lm.ready.tokenizer.sha256,
        "sampled": loaded.sampled, "data": loaded.data, "share_prefix": lm.share_prefix, "seconds": seconds,
        **totals,
    }  # fmt: skip
    return results


def _task_hashes(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """One hash per task over documents, prompts and answers."""
    return {
        task: hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
        for task, rows in samples.items()
    }


def _file_name(name: str) -> str:
    return re.sub(r"[\"<>:/|\\?*\[\]\s]+", "__", name).strip("_")[-100:]


def results_folder(out: Path, model: str) -> Path:
    """The folder below `out` for the results of `model`, the folder that was evaluated."""
    return out / _file_name(model)


def write_results(out: Path, results: dict[str, Any], log_samples: bool) -> Path:
    """Write results (and samples) as the harness names its files. Returns the results file."""
    folder = results_folder(out, results["model_name"])
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now().isoformat().replace(":", "-")
    samples = results.get("samples", {})
    kept = {key: value for key, value in results.items() if key != "samples"}
    if log_samples:
        for task, rows in samples.items():
            lines = "".join(_dumps(row) + "\n" for row in rows)
            write_text_atomic(folder / f"samples_{_file_name(task)}_{date}.jsonl", lines)
    path = folder / f"results_{date}.json"
    write_text_atomic(path, _dumps(kept, indent=2) + "\n")
    return path


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
