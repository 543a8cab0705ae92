"""`tnllm data clean`, `dedup`, `score`, and what `inspect` shows of their results."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from tnllm.cli import options
from tnllm.errors import UserError
from tnllm.files import check_output_file
from tnllm.tables import print_json

Executor = StrEnum("Executor", {"local": "local", "slurm": "slurm", "ray": "ray"})
CLEAN_EPILOG = options.examples("tnllm data clean data/sample -o clean-out", "tnllm data clean web/ -o out --workers 8")
DEDUP_EPILOG = options.examples("tnllm data dedup dirty-sample -o unique --threshold 0.7 --pairs pairs.tsv")
SELF_CLEAN_EPILOG = options.examples(
    "tnllm data self-clean dirty-sample -o better --set self_clean.set=train.max_steps=50"
)
SCORE_EPILOG = options.examples("tnllm data score web.jsonl --model runs/tiny -o scores.jsonl")


def clean(
    inputs: list[str] = typer.Argument(
        None, help="A recipe (.yaml, or a packaged name such as data/sample), or files and folders, or both."
    ),
    out: str | None = typer.Option(None, "--out", "-o", help="Folder or URL for the result; run again to resume."),
    sets: list[str] = options.SETS,
    workers: int | None = typer.Option(None, min=1, help="Processes, or tasks at a time on a cluster. Default: cores."),
    executor: Executor = typer.Option(Executor.local, help="Where tasks run; slurm submits them and returns."),
    device: str = options.DEVICE,
    keep_rejected: bool | None = typer.Option(
        None, "--keep-rejected/--drop-rejected", help="Keep rejected documents, with reasons. [default: by the recipe]"
    ),
    prune: bool = typer.Option(False, "--prune", help="Remove the intermediate files at the end."),
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.AS_JSON,
    keys: bool = typer.Option(False, "--keys", help="Print every key of a recipe with its meaning and stop."),
) -> None:
    """Clean a corpus: repair, filter, drop duplicates, evaluation text, and what a model finds unlikely."""
    from tnllm.cleaning.recipe import describe, load_clean_recipe

    if keys:
        print(describe())
        return
    recipe, paths = _split(inputs or [])
    more = [f"output.keep_rejected={str(keep_rejected).lower()}"] if keep_rejected is not None else []
    if paths:
        more.append(f"input.path={json.dumps(paths)}")
    settings = load_clean_recipe(recipe, [*more, *sets])
    if out is None:
        raise UserError("no --out is given; name a folder for the result: -o clean-out")
    _run(settings, out, workers, executor, as_json, device=device, overwrite=overwrite, prune=prune)


def dedup(
    inputs: list[str] = options.CORPUS,
    out: Path = options.OUT,
    threshold: float = typer.Option(0.8, help="Jaccard similarity of n-grams; 1: exact duplicates only."),
    field: str = options.FIELD,
    id_field: str = options.ID_FIELD,
    words: int = typer.Option(5, help="Words in an n-gram."),
    characters: int = typer.Option(5, help="Characters in an n-gram of Chinese, Japanese or Korean text."),
    verify: str = typer.Option("exact", help="exact, or estimate: trust MinHash without comparing the texts."),
    memory_mb: float = typer.Option(1024, help="Most memory for matching; more documents take more passes."),
    pairs: Path | None = typer.Option(None, help="Write near-duplicate pairs here (TSV: two ids, their similarity)."),
    truth: Path | None = typer.Option(None, help="Labelled pairs (TSV: two ids, perhaps a similarity) to score by."),
    workers: int | None = typer.Option(None, min=1, help="Processes. [default: cores]"),
    overwrite: bool = options.OVERWRITE,
    as_json: bool = options.AS_JSON,
) -> None:
    """Drop exact and near duplicates only; texts stay as they are."""
    from pydantic import ValidationError

    from tnllm.cleaning.settings import only_dedup

    try:
        settings = only_dedup(
            path=tuple(inputs), field=field, id_field=id_field,
            threshold=threshold, words=words, characters=characters, verify=verify, memory_mb=memory_mb,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][-1]).replace("_", "-")
        raise UserError(f"--{flag} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    known = set(_read_pairs(truth, threshold)) if truth is not None else None
    if pairs is not None:
        from tnllm.data.remote import find_sources, local_files

        read = local_files(find_sources(inputs, out))
        check_output_file(pairs, "--pairs", [*read, truth] if truth is not None else read)
    _run(settings, out, workers, Executor.local, as_json, overwrite=overwrite)
    if pairs is not None or truth is not None:
        _list_pairs(out, pairs, truth, known)


def self_clean(
    inputs: list[str] = typer.Argument(..., help="A cleaning recipe, files, folders, or both."),
    out: Path = options.OUT,
    sets: list[str] = options.SETS,
    device: str = options.DEVICE,
    as_json: bool = options.AS_JSON,
) -> None:
    """Train a small model on a corpus, drop what it finds unlikely, repeat; needs no extra, so it runs on a GPU node."""
    from tnllm.cleaning.recipe import load_clean_recipe
    from tnllm.cleaning.run import self_clean_alone

    recipe, paths = _split(inputs)
    more = ["self_clean.rounds=1"] if recipe is None else []
    more += [f"input.path={json.dumps(paths)}"] if paths else []
    report = self_clean_alone(load_clean_recipe(recipe, [*more, *sets]), out, device)
    _print(report, as_json)


def score(
    inputs: list[str] = options.CORPUS,
    model: Path | None = options.MODEL,
    out: Path | None = typer.Option(None, "--out", "-o", help="File for the scores (JSON Lines). [default: stdout]"),
    field: str = options.FIELD,
    id_field: str = options.ID_FIELD,
    label_field: str | None = typer.Option(None, help="Field with label 0 or 1, which the scores are to separate."),
    device: str = options.DEVICE,
    dtype: str = options.DTYPE,
) -> None:
    """Score documents by a model: bits per byte and perplexity, of each read in full."""
    from tnllm.cleaning.input_shards import fingerprint
    from tnllm.cleaning.score import kept_scores, score_texts
    from tnllm.data.documents import LeftOut
    from tnllm.data.remote import find_sources, local_files, read_documents
    from tnllm.generation.context import weights_hash
    from tnllm.generation.loading import load
    from tnllm.progress import ScoringProgress, corpus_progress, log

    files = find_sources(inputs)
    if out is not None:
        check_output_file(out, "--out", local_files(files))
    columns = [id_field] if label_field is None else [id_field, label_field]
    ready = load(model, device, dtype)
    labelled: list[tuple[float, Any]] = []
    waiting: deque[tuple[str, Any]] = deque()

    def texts(progress: ScoringProgress, old: list[dict[str, Any]]) -> Iterator[str]:
        number = 0
        for document in read_documents(files, field, on_bad=LeftOut(), report=progress.on_read, more=columns):
            if document.text.strip():
                label = document.record.get(label_field or "")
                if number < len(old):
                    labelled.append((old[number]["bits_per_byte"], label))
                else:
                    waiting.append((str(document.record.get(id_field, document.where)), label))
                    progress.on_text(document.text)
                    yield document.text
                number += 1

    about = [weights_hash(ready.model), str(ready.model.device), str(ready.model.dtype), field, id_field]
    about += [f"{file} {fingerprint(file)}" for file in files]
    with ExitStack() as stack:
        old: list[dict[str, Any]] = []
        write: Callable[[dict[str, Any]], None] = print_json
        if out is not None:
            old, write = stack.enter_context(kept_scores(out, ready.model, json.dumps(about)))
        report = stack.enter_context(corpus_progress("score"))
        if old:
            log(f"{len(old):,} documents were scored before")
        progress = ScoringProgress(report)
        scores = score_texts(ready.model, ready.tokenizer, texts(progress, old), report=progress.on_scored)
        for result in scores:
            name, label = waiting.popleft()
            labelled.append((round(result.bits_per_byte, 5), label))
            write({
                "id": name, "bits_per_byte": round(result.bits_per_byte, 5), "perplexity": round(result.perplexity, 3),
                "tokens": result.tokens, "bytes": result.num_bytes,
            })  # fmt: skip
    if label_field is not None:
        area = separation(labelled)
        log(f"{len(labelled)} documents; a document with label 1 has the lower score in {area:.1%} of pairs")


def separation(labelled: list[tuple[float, Any]]) -> float:
    """Share of (label 1, label 0) pairs in which the first has the lower value, ties half: the area under the ROC."""
    from bisect import bisect_left, bisect_right

    zeros, ones = (sorted(value for value, label in labelled if str(label) == kind) for kind in "01")
    if not zeros or not ones:
        raise UserError("--label-field needs documents with label 0 and documents with label 1")
    wins = sum(len(zeros) - (bisect_left(zeros, x) + bisect_right(zeros, x)) / 2 for x in ones)
    return wins / (len(zeros) * len(ones))


def _split(inputs: list[str]) -> tuple[str | None, list[str]]:
    """The recipe among `inputs`, None if there is none, and the other paths."""
    recipes = [
        name
        for name in inputs
        if name.endswith((".yaml", ".yml")) or (name.startswith("data/") and not Path(name).exists())
    ]
    if len(recipes) > 1:
        raise UserError(f"{len(recipes)} recipes are given ({', '.join(recipes)}); name one")
    return (recipes[0] if recipes else None), [name for name in inputs if name not in recipes]


def _run(settings: Any, out: str | Path, workers: int | None, executor: Executor, as_json: bool, **how: Any) -> None:
    from tnllm.cleaning.report import HTML, JSON
    from tnllm.cleaning.run import clean as run_clean
    from tnllm.data.tokenize import num_cores
    from tnllm.data.upload import begin_output, finish_output
    from tnllm.files import format_count, format_duration
    from tnllm.progress import Progress

    start = time.monotonic()
    folder = begin_output(out, settings.input.path)
    with Progress() as progress:

        def watch(now: Any) -> None:
            if now.total_bytes:
                amounts = (now.num_bytes, now.total_bytes, f"{format_count(now.documents)} documents", "bytes")
            else:
                amounts = (now.done, now.tasks, "", "tasks")
            progress.update(f"clean: {now.stage}", *amounts)

        report = run_clean(settings, folder, workers or num_cores(), watch, executor.value, **how)
    if report is None:
        print(
            f"submitted to Slurm; when the jobs are done, run the same command again for the rest ({folder}/work/*/logs)"
        )
        return
    finish_output(out, folder, last=JSON)
    _print(report, as_json)
    if as_json:
        return
    print(
        f"{out}/clean: {report['documents_out']:,} documents in {format_duration(time.monotonic() - start)}; {out}/{HTML}"
    )


def _print(report: dict[str, Any], as_json: bool) -> None:
    from tnllm.cleaning.report import render

    if as_json:
        print_json(report)
    else:
        print(render(report))


def _list_pairs(out: Path, path: Path | None, truth: Path | None, known: set[frozenset[str]] | None) -> None:
    from tnllm.cleaning.dedup import near_pairs
    from tnllm.files import write_text_atomic

    pairs = list(near_pairs(out / "work" / "groups.npz", out / "work" / "signatures"))
    if path is not None:
        write_text_atomic(path, "".join(f"{a}\t{b}\t{similarity:.4f}\n" for a, b, similarity in pairs))
        print(f"{path}: {len(pairs):,} pairs")
    if truth is not None and known is not None:
        listed = {frozenset((a, b)) for a, b, _ in pairs}
        hits = len(listed & known)
        precision, recall = hits / max(len(listed), 1), hits / max(len(known), 1)
        print(
            f"against {truth.name}: {len(known)} labelled pairs, {len(listed)} found, {hits} right; "
            f"precision {precision:.4f}, recall {recall:.4f}"
        )


def _read_pairs(path: Path, threshold: float) -> Iterator[frozenset[str]]:
    """Labelled pairs; of those with a similarity, the ones that reach the threshold."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--truth is {path}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"--truth is {path}, which is not UTF-8 text; give lines of two ids, perhaps a similarity"
        ) from None
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if number == 1 and cells[:1] == ["id1"]:
            continue
        try:
            similarity = [float(cell) for cell in cells[2:]] or [threshold]
        except ValueError:
            similarity = []
        if len(cells) not in (2, 3) or not similarity:
            raise UserError(f"{path}:{number}: {line[:80]!r}; expected two ids and optionally a similarity")
        if similarity[0] >= threshold:
            yield frozenset(cells[:2])


def show_run(folder: Path, reason: str | None, samples: int, as_json: bool) -> None:
    """What `tnllm data inspect` prints of a cleaning run's folder."""
    from tnllm.cleaning.report import read_report, rejected_samples

    if reason is None:
        _print(read_report(folder), as_json)
        return
    for record in rejected_samples(folder, reason, samples):
        if as_json:
            print_json(record)
            continue
        verdict = {key: value for key, value in record["rejected"].items() if key != "figures"}
        print(f"{record['id']}  {json.dumps(verdict, ensure_ascii=False)}")
        print("".join(f"    {line}\n" for line in record["text"][:600].split("\n")), end="")
