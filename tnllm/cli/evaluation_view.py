"""Output of `tnllm eval`: tables on stdout, remarks on stderr."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tnllm.files import format_duration
from tnllm.progress import log
from tnllm.tables import print_table

# Metrics between 0 and 1 that are shown in percent.
_SHARES = ("acc", "acc_norm", "exact_match", "f1", "mcc", "em")


def quiet_libraries(names: list[str], online: bool) -> None:
    """Silence the harness's bars and warnings, and keep its libraries off the network unless `names` need it.

    Call it before they are imported.
    """
    import logging
    import warnings

    from tnllm.evaluation.cards import PAPER_GROUP, find_card

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not online and all(name == PAPER_GROUP or find_card(name) for name in names):
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers quiet and offline, and its copies of a folder's code in a temporary folder.

    Call it before transformers is imported.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tnllm-code-") as folder:
        os.environ["HF_MODULES_CACHE"] = folder
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield


def show_results(results: dict[str, Any], subtasks: bool) -> None:
    """One line per task and metric; subjects of a group only with `subtasks`."""
    from tnllm.evaluation.compare import is_sample, shots

    groups = results.get("group_subtasks") or {}
    members: set[str] = set().union(*groups.values())
    names = [name for name in results["results"] if name in groups and name not in members]
    leaves = members - groups.keys()
    names += [name for name in results["results"] if name not in names and (subtasks or name not in leaves)]
    rows = []
    for name in names:
        values = results["results"][name]
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            label = f"{name} (sample)" if is_sample(results, name) else name
            examples = shots(results, name)
            count = (results.get("n-samples", {}).get(name) or {}).get("effective") or values.get("sample_len", "")
            rows.append(
                [
                    label, str(results.get("versions", {}).get(name, "")), "" if examples is None else str(examples),
                    f"{count:,}" if count else "", metric if filter_name == "none" else f"{metric} ({filter_name})",
                    _figure(metric, value), _figure(metric, error),
                ]
            )  # fmt: skip
    about = results.get("tnllm") or {}
    print_table(["task", "version", "shots", "questions", "metric", "value", "± stderr"], rows, right=_RIGHT)
    note = f"weights {about.get('weights_sha256', '')[:12]}, lm-eval {results.get('lm_eval_version')}"
    if "tokens_computed" in about:
        cached, asked = about["requests_from_cache"], about["requests"]
        work = []
        if cached:
            work.append(f"{'all ' if cached == asked else f'{cached:,} of '}{asked:,} answers from the cache")
        if cached < asked:
            others = " for the others" if cached else ""
            work.append(
                f"{about['tokens_computed']:,} tokens computed for {about['tokens_one_by_one']:,} asked{others}"
            )
        note += f"; {', '.join(work)}, {format_duration(about['seconds'])}"
    log(note)
    if any("(sample)" in row[0] for row in rows):
        log("(sample): few questions that ship with tnllm as a demonstration; their scores do not measure a model")


_RIGHT = ("shots", "questions", "value", "± stderr", "A", "B", "B - A", "paper", "tokens")


def _figure(metric: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    return f"{100 * value:.2f}" if metric in _SHARES else f"{value:.4f}"


def show_tasks(rows: list[dict[str, Any]], with_files: bool) -> None:
    """The tasks with offline data."""
    table = []
    for row in rows:
        path = (row["file"] or "not found") if with_files else (row["sample"] or "-")
        table.append(
            [row["task"], ", ".join(row["aliases"]), f"{row['questions']:,}", row["licence"], path, row["source"]]
        )
    columns = ["task", "also", "questions", "licence", "file" if with_files else "ships with tnllm", "source"]
    print_table(columns, table, right=_RIGHT, styles={"not found": "red"})
    log("tnl-paper is BoolQ to OpenBookQA without examples and MMLU, CMMLU, C-Eval with 5, as in the paper's tables")
    log("any other task of lm-evaluation-harness works too: tnllm eval ls PATTERN")


def show_comparison(rows: list[dict[str, Any]], paper: str | None) -> None:
    """Differences with their standard errors."""
    both = any("b" in row for row in rows)
    columns = ["task", "metric", "A", *(["B", "B - A"] if both else []), *(["paper"] if paper else [])]
    table = []
    for row in rows:
        label = f"{row['task']} ({'; '.join(row['notes'])})" if row["notes"] else row["task"]
        cells = [label, row["metric"], _with_error(row, "a")]
        if both:
            cells += [_with_error(row, "b"), _delta(row)]
        if paper:
            cells.append("" if row["paper"] is None else f"{row['paper']:.2f}")
        table.append(cells)
    print_table(columns, table, right=_RIGHT)
    if both:
        log("B - A: * marks a difference of more than two standard errors")


def _with_error(row: dict[str, Any], side: str) -> str:
    error = _figure(row["metric"], row[f"{side}_stderr"])
    return _figure(row["metric"], row[side]) + (f" ± {error}" if error else "")


def _delta(row: dict[str, Any]) -> str:
    scale = 100 if row["metric"] in _SHARES else 1
    text = f"{scale * row['delta']:+.{2 if scale == 100 else 4}f}"
    error = row["delta_stderr"]
    if error is None:
        return text
    return f"{text} ± {_figure(row['metric'], error)}" + (" *" if abs(row["delta"]) > 2 * error else "  ")


def show_check(result: dict[str, Any]) -> None:
    """Answers of both implementations, then their cost, then every answer that differs."""
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    print(f"{result['model']}, {result['dtype']}, hf batches of {result['batch_size']}; {environment}")
    print(f"lm-eval {result['lm_eval']}, transformers {result['transformers']}")
    rows = []
    for row in result["tasks"]:
        for metric, score in row["metrics"].items():
            changed = sum(each["metric"] == metric for each in row["changed"])
            rows.append(
                [
                    row["task"], f"{row['questions']:,}", metric, f"{100 * score['tnllm']:.2f}", f"{100 * score['hf']:.2f}",
                    str(changed), f"{row['largest_difference']:.2g}", f"{row['mean_difference']:.2g}",
                ]
            )  # fmt: skip
    columns = ["task", "questions", "metric", "tnllm %", "hf %", "answers differ", "nats at most", "nats on average"]
    print_table(columns, rows, right=[column for column in columns if column not in ("task", "metric")])
    rows = [
        [
            row["task"], f"{row['requests']:,}", *(f"{row['tokens'][way]:,}" for way in ("tnllm", "hf")),
            *(f"{row['seconds'][way]:.1f}" for way in ("tnllm", "hf")),
        ]
        for row in result["tasks"]
    ]  # fmt: skip
    columns = ["task", "requests", "tokens tnllm", "tokens hf", "seconds tnllm", "seconds hf"]
    print_table(columns, rows, right=columns[1:])
    for row in result["tasks"]:
        for each in row["changed"]:
            print(
                f"{each['task']}, question {each['question']}, {each['metric']}: tnllm takes choice {each['tnllm']}, hf "
                f"{each['hf']}, whose lead is {each['margin']:.2g} {each['unit']}; log-likelihoods there differ by "
                f"{each['difference']:.2g}"
            )
    changed = sum(len(row["changed"]) for row in result["tasks"])
    questions = sum(row["questions"] for row in result["tasks"])
    print(f"{changed} answers differ in {questions:,} questions; tokens of hf count its padding")


def show_perplexity(result: dict[str, Any]) -> None:
    """Totals, then by position."""
    counts = ", ".join(f"{result[name]:,} {name}" for name in ("documents", "tokens", "words", "bytes"))
    print(counts)
    names = ("word_perplexity", "byte_perplexity", "token_perplexity", "bits_per_byte")
    rows = [["in full, state carried", *(f"{result[name]:,.4f}" for name in names)]]
    if windows := result.get("windows"):
        label = f"{windows['pieces']:,} windows of {windows['window']:,} tokens"
        rows.append([label, *(f"{windows[name]:,.4f}" for name in names)])
    print_table(["", *(name.replace("_", " ") for name in names)], rows)
    rows = [
        [
            f"{row['from']:,} to {row['to']:,}", f"{row['tokens']:,}", f"{row['token_perplexity']:,.2f}",
            "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
        ]
        for row in result["by_position"]
    ]  # fmt: skip
    print_table(["position in the text", "tokens", "token perplexity", "bits per byte"], rows, right=_RIGHT)


def show_needles(rows: list[dict[str, Any]]) -> None:
    """A line a length: exact and chosen at each depth, in per cent."""
    depths = sorted({row["depth"] for row in rows})
    table = []
    for length in sorted({row["length"] for row in rows}):
        of = {row["depth"]: row for row in rows if row["length"] == length}
        mean = sum(row["nats"] for row in of.values()) / len(of)
        cells = [f"{100 * of[depth]['exact']:.0f} / {100 * of[depth]['chosen']:.0f}" for depth in depths]
        table.append([f"{length:,}", *cells, f"{mean:.2f}"])
    columns = ["tokens", *(f"{depth} %" for depth in depths), "nats"]
    print_table(columns, table, right=columns)
    print(f"exact / chosen of ten, in per cent of {rows[0]['samples']} prompts; columns: where the needle stands")
