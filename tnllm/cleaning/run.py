"""A whole cleaning run: filters and de-duplication, then self-cleaning, then the report.

report = clean(settings, Path("clean-out"), 2, on_progress)    # None if the jobs were only submitted to Slurm
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm.cleaning.records import RecordWriter, named_fields, read_folder
from tnllm.cleaning.report import build_report, self_clean_report, write_report
from tnllm.cleaning.self_clean import self_clean
from tnllm.cleaning.settings import CleanSettings
from tnllm.data.documents import LeftOut
from tnllm.data.folders import refuse_replacing
from tnllm.data.remote import RemoteFile, find_sources, read_documents
from tnllm.errors import MissingExtra, UserError
from tnllm.files import LOCK, check_output_folder, only_writer, write_text_atomic
from tnllm.progress import log

if TYPE_CHECKING:
    # Self-cleaning alone also runs where datatrove is not installed, such as a GPU machine.
    from tnllm.cleaning.executor import ExecutorName, OnProgress

_SHARD_CHARS = 64 << 20


def clean(
    settings: CleanSettings,
    out: Path,
    workers: int,
    on_progress: "OnProgress",
    executor: "ExecutorName" = "local",
    device: str = "auto",
    overwrite: bool = False,
    prune: bool = False,
) -> dict[str, Any] | None:
    """Clean into OUT/clean, or resume a run that was stopped; returns the report that OUT/report.json holds.

    `prune` removes OUT/work at the end. Raises UserError for bad settings or input and for a folder made with others,
    RunError for damaged files and lost workers; finished shards are kept in every case.
    """
    try:
        from tnllm.cleaning.executor import run_stages
        from tnllm.cleaning.pipeline import open_run
    except ImportError as error:
        raise MissingExtra("data", error.name or "datatrove") from None
    if not settings.input.path:
        raise UserError("no input is given; name files or folders, or set input.path in the recipe")
    files = _input_files(settings, out)
    with only_writer(out):
        started = time.time()
        run = open_run(settings, out, files, overwrite)
        if not run_stages(run.stages, executor, workers, settings.slurm, on_progress):
            return None
        rounds = self_clean(settings, run.unique, out, device) if settings.self_clean.rounds else None
        report = build_report(run, rounds)
        report["seconds"] = round(time.time() - started, 2)
        report["workers"] = workers
        write_report(out, report)
        if prune:
            shutil.rmtree(run.work)
        return report


def self_clean_alone(settings: CleanSettings, out: Path, device: str = "auto") -> dict[str, Any]:
    """Self-clean a corpus as it is into OUT/clean, or resume; returns the report.

    Raises UserError for bad settings or input.
    """
    if not settings.input.path:
        raise UserError("no input is given; name files or folders")
    if not settings.self_clean.rounds:
        raise UserError("self_clean.rounds is 0; give a recipe with rounds, or --set self_clean.rounds=1")
    files = _input_files(settings, out)
    with only_writer(out):
        source = out / "work" / "unique"
        _check_same(settings, out)
        if not (source / "done").exists():
            _import_corpus(settings, files, source)
        rounds = self_clean(settings, source, out, device)
        values = (record.get(settings.output.tally_field or "") for record in read_folder(source))
        report = self_clean_report(out, rounds, Counter(str(value) for value in values if value is not None))
        write_report(out, report)
        return report


def _input_files(settings: CleanSettings, out: Path) -> list[Path | RemoteFile]:
    """The input's files without those below `out`. Raises UserError if writing to `out` would replace something read."""
    check_output_folder(out, "the output")
    chosen = settings.self_clean
    others = (*settings.decontaminate.path, *chosen.seed_path, *chosen.held_out)
    refuse_replacing((*settings.input.path, *others, *settings.blocklist.words, *settings.blocklist.hosts), out)
    return find_sources(settings.input.path, out)


def _check_same(settings: CleanSettings, out: Path) -> None:
    others = sorted(item.name for item in out.iterdir() if item.name != LOCK)
    if others and not (out / "recipe.json").exists():
        raise UserError(f"{out} is not empty (it holds {others[0]}); choose a new folder")
    record = json.dumps(settings.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    path = out / "recipe.json"
    if path.exists() and path.read_text("utf-8") != record:
        raise UserError(f"{out} was made with other settings; choose another folder")
    write_text_atomic(path, record)


def _import_corpus(settings: CleanSettings, files: list[Path | RemoteFile], folder: Path) -> None:
    """Write the corpus as shards of records."""
    chosen = settings.input
    left_out = LeftOut() if chosen.on_error == "skip" else None
    advice = "fix it, or set input.on_error to skip"
    documents = read_documents(files, chosen.field, chosen.split_on, left_out, advice=advice)
    lost_fields: Counter[str] = Counter()
    number, document = 0, next(documents, None)
    while document is not None:
        with RecordWriter(folder / f"{number:05d}.jsonl.gz") as writer:
            size = 0
            while document is not None and size < _SHARD_CHARS:
                name, fields, lost = named_fields(document, chosen.id_field, chosen.source_field)
                lost_fields.update(f"{field} of {document.url or document.file}: {why}" for field, why in lost.items())
                writer.write({"text": document.text, "id": name} | fields)
                size += len(document.text)
                document = next(documents, None)
        number += 1
    if not number:
        raise UserError("the corpus is empty: nothing to self-clean")
    for name, count in lost_fields.most_common(10):
        log(f"a field could not be kept in {count:,} documents: {name}")
    if left_out is not None and left_out.count:
        log(f"{left_out.count:,} records could not be read")
    (folder / "done").touch()
