"""A whole cleaning run: filters and de-duplication, then self-cleaning, then the report.

report = clean(settings, Path("clean-out"), workers=2)    # None where Slurm has only taken the jobs
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm import assets
from tnllm.cleaning.report import build_report, self_clean_report, write_report
from tnllm.cleaning.self_clean import self_clean
from tnllm.cleaning.settings import CleanSettings
from tnllm.cleaning.shards import Lines, locked, read_lines
from tnllm.data.corpus import find_files, read_documents
from tnllm.errors import MissingExtra, UserError
from tnllm.files import write_text_atomic

if TYPE_CHECKING:
    # Self-cleaning alone runs where datatrove is not installed, on a GPU machine say.
    from tnllm.cleaning.executor import ExecutorName, Watch

_SHARD_CHARS = 64 << 20


def clean(
    settings: CleanSettings,
    out: Path,
    workers: int,
    watch: "Watch",
    executor: "ExecutorName" = "local",
    device: str = "auto",
    overwrite: bool = False,
    prune: bool = False,
) -> dict[str, Any] | None:
    """Clean into OUT/clean, or go on where a run was stopped; returns the report that OUT/report.json holds.

    `prune` removes OUT/work at the end. Raises UserError for bad settings or input and a folder made otherwise,
    RunError for damage and lost workers; finished shards stay in every case.
    """
    try:
        from tnllm.cleaning.executor import run_stages
        from tnllm.cleaning.pipeline import open_run
    except ImportError as error:
        raise MissingExtra("data", error.name or "datatrove") from None
    if not settings.input.path:
        raise UserError("no input is given; name files or folders, or set input.path in the recipe")
    files = find_files(map(assets.named, settings.input.path))
    with locked(out):
        started = time.time()
        run = open_run(settings, out, files, overwrite)
        if not run_stages(run.stages, executor, workers, settings.slurm, watch):
            return None
        rounds = _rounds(settings, run.unique, out, device) if settings.self_clean.rounds else None
        report = build_report(run, rounds)
        report["seconds"] = round(time.time() - started, 2)
        report["workers"] = workers
        write_report(out, report)
        if prune:
            shutil.rmtree(run.work)
        return report


def self_clean_alone(settings: CleanSettings, out: Path, device: str = "auto") -> dict[str, Any]:
    """Self-clean a corpus as it is into OUT/clean, or go on where that was stopped; returns the report.

    Raises UserError for bad settings or input.
    """
    if not settings.input.path:
        raise UserError("no input is given; name files or folders")
    if not settings.self_clean.rounds:
        raise UserError("self_clean.rounds is 0; give a recipe with rounds, or --set self_clean.rounds=1")
    with locked(out):
        source = out / "work" / "unique"
        _check_same(settings, out)
        if not (source / "done").exists():
            _copy_in(settings, source)
        found = _rounds(settings, source, out, device)
        tally: dict[str, int] = {}
        for path in sorted(source.glob("*.jsonl.gz")):
            for record in read_lines(path):
                value = record.get(settings.output.tally_field or "")
                if value is not None:
                    tally[str(value)] = tally.get(str(value), 0) + 1
        report = self_clean_report(out, found, tally)
        write_report(out, report)
        return report


def _check_same(settings: CleanSettings, out: Path) -> None:
    record = json.dumps(settings.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    held = out / "recipe.json"
    if held.exists() and held.read_text("utf-8") != record:
        raise UserError(f"{out} was made with other settings; choose another folder")
    write_text_atomic(held, record)


def _copy_in(settings: CleanSettings, folder: Path) -> None:
    """The corpus as shards of records."""
    chosen = settings.input
    documents = read_documents(find_files(map(assets.named, chosen.path)), chosen.field, chosen.split_on)
    number, document = 0, next(documents, None)
    while document is not None:
        with Lines(folder / f"{number:05d}.jsonl.gz") as lines:
            size = 0
            while document is not None and size < _SHARD_CHARS:
                record = document.record
                name = str(record.pop(chosen.id_field, document.where))
                record["source"] = str(record.pop(chosen.source_field, document.file.name.split(".")[0]))
                lines.write({"text": document.text, "id": name, **record})
                size += len(document.text)
                document = next(documents, None)
        number += 1
    if not number:
        raise UserError("the corpus is empty: nothing to self-clean")
    (folder / "done").touch()


def _rounds(settings: CleanSettings, source: Path, out: Path, device: str) -> dict[str, Any]:
    return self_clean(
        settings.self_clean,
        source,
        out,
        device,
        settings.output.keep_rejected,
        settings.output.tally_field,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
