"""A whole cleaning run: filters and de-duplication, then self-cleaning, then the report.

report = clean(settings, Path("clean-out"), workers=2)    # None where Slurm has only taken the jobs
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tnllm import assets
from tnllm.data.cleaning.executor import ExecutorName, Watch, run_stages
from tnllm.data.cleaning.pipeline import CleanRun, locked, open_run
from tnllm.data.cleaning.report import build_report, write_report
from tnllm.data.cleaning.settings import CleanSettings
from tnllm.data.corpus import find_files
from tnllm.errors import UserError


def clean(
    settings: CleanSettings,
    out: Path,
    workers: int,
    watch: Watch,
    executor: ExecutorName = "local",
    device: str = "auto",
    overwrite: bool = False,
    prune: bool = False,
) -> dict[str, Any] | None:
    """Clean into OUT/clean, or go on where a run was stopped; returns the report that OUT/report.json holds.

    `prune` removes OUT/work at the end. Raises UserError for bad settings or input and a folder made otherwise,
    RunError for damage and lost workers; finished shards stay in every case.
    """
    if not settings.input.path:
        raise UserError("no input is given; name files or folders, or set input.path in the recipe")
    files = find_files(map(assets.named, settings.input.path))
    with locked(out):
        started = time.time()
        run = open_run(settings, out, files, overwrite)
        if not run_stages(run.stages, executor, workers, settings.slurm, watch):
            return None
        rounds = _self_clean(run, device) if settings.self_clean.rounds else None
        report = build_report(run, rounds)
        report["seconds"] = round(time.time() - started, 2)
        report["workers"] = workers
        write_report(out, report)
        if prune:
            shutil.rmtree(run.work)
        return report


def _self_clean(run: CleanRun, device: str) -> dict[str, Any]:
    from tnllm.cleaning.selfclean import self_clean

    settings = run.settings
    return self_clean(
        settings.self_clean,
        run.unique,
        run.out,
        device,
        settings.output.keep_rejected,
        settings.output.tally_field,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
