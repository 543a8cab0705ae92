"""The stages of a cleaning run, from files to unique documents. Self-cleaning, which needs a model, comes after them.

run = open_run(settings, Path("clean-out"))
run_stages(run.stages, "local", workers=2, ...)     # see executor.py
run.unique                                          # the folder of the documents that are kept

OUT/recipe.json      settings and inputs; a run with others is refused
OUT/work/filtered    documents that passed the filters, one file a shard
OUT/work/unique      without duplicates (without self-cleaning, OUT/clean)
OUT/rejected         STAGE-NNNNN.jsonl.gz
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnllm import __version__, assets
from tnllm.cleaning.decontaminate import build_index, eval_files
from tnllm.cleaning.dedup import MATCH_TASKS, Choose, Drop, Group, Match, Shingle, Sign, num_bands
from tnllm.cleaning.executor import Stage, stage_stats
from tnllm.cleaning.input_shards import Piece, fingerprint, plan_shards
from tnllm.cleaning.settings import CleanSettings
from tnllm.cleaning.steps import Writer, filter_steps
from tnllm.data.remote import RemoteFile, find_sources
from tnllm.errors import RunError, UserError
from tnllm.files import LOCK, write_text_atomic

RECORD = "recipe.json"


@dataclass(frozen=True)
class CleanRun:
    """A cleaning run on disk."""

    out: Path
    settings: CleanSettings
    stages: tuple[Stage, ...]
    unique: Path
    input_bytes: int

    @property
    def work(self) -> Path:
        """Files between stages; may be removed when the run is done."""
        return self.out / "work"

    def stats(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Stage → step → counts so far."""
        return {stage.name: stage_stats(stage) for stage in self.stages}


def open_run(
    settings: CleanSettings, out: Path, files: list[Path | RemoteFile] | None = None, overwrite: bool = False
) -> CleanRun:
    """Plan the stages in the folder `out`, or resume what is there.

    Raises UserError for input that does not exist and for a folder made from other input or settings.
    """
    files = files if files is not None else find_sources(settings.input.path, out)
    record = {
        "created_by": f"tnllm {__version__}",
        "settings": settings.model_dump(mode="json"),
        "inputs": {str(path): fingerprint(path) for path in files},
    }
    _check_folder(out, json.loads(json.dumps(record)), overwrite)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    work = out / "work"
    shards = plan_shards(files, int(settings.input.shard_mb * 2**20))
    last = work / "unique" if settings.self_clean.rounds else out / "clean"
    input_bytes = sum(piece.size for shard in shards for piece in shard)
    return CleanRun(out, settings, tuple(_stages(settings, shards, out, work, last)), last, input_bytes)


def _stages(settings: CleanSettings, shards: list[list[Piece]], out: Path, work: Path, last: Path) -> Iterator[Stage]:
    rejected = out / "rejected" if settings.output.keep_rejected else None
    dedup = settings.dedup
    signatures, pairs, groups = work / "signatures", work / "pairs", work / "groups.npz"
    shingles = work / "shingles"
    filtered = work / "filtered" if dedup.enabled else last
    more = [Sign(signatures, dedup)] if dedup.enabled else []
    steps = filter_steps(settings, shards, _index(settings, work), [*more, Writer(filtered, rejected, "filter")])
    count = len(shards)
    sizes = [sum(piece.size for piece in shard) for shard in shards]
    yield Stage("filter", steps, count, work / "filter", sizes)
    if dedup.enabled:
        tasks = min(MATCH_TASKS, num_bands(dedup) + 1)
        yield Stage("match", [Match(signatures, pairs, dedup)], tasks, work / "match")
        if dedup.verify == "exact":
            yield Stage("choose", [Choose(signatures, pairs, shingles, dedup)], 1, work / "choose")
            yield Stage("shingle", [Shingle(filtered, shingles, dedup)], count, work / "shingle")
        yield Stage("group", [Group(signatures, pairs, shingles, groups, dedup)], 1, work / "group")
        drop = Drop(settings, filtered, groups, signatures)
        yield Stage("dedup", [drop, Writer(last, rejected, "dedup")], count, work / "dedup")


def _index(settings: CleanSettings, work: Path) -> Path | None:
    """The file of the evaluation sets' n-gram hashes, made once."""
    chosen = settings.decontaminate
    if not chosen.path:
        return None
    path = work / "evaluation.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        build_index(eval_files(map(assets.named, chosen.path)), chosen.words, chosen.characters).save(path)
    return path


def _check_folder(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    path = out / RECORD
    if not path.is_file():
        others = sorted(item.name for item in out.iterdir() if item.name != LOCK) if out.is_dir() else []
        if others:
            raise UserError(f"{out} is not empty (it holds {others[0]}); choose a new folder")
        return
    if overwrite:
        for name in ("work", "clean", "rejected"):
            shutil.rmtree(out / name, ignore_errors=True)
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise RunError(f"{path} is damaged; start again with --overwrite") from None
    if change := _difference(before, record):
        raise UserError(f"{out} was made with {change}; choose another folder or start again with --overwrite")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    for section, values in now["settings"].items():
        for key, value in values.items():
            old = before["settings"].get(section, {}).get(key)
            if old != value and section != "slurm":
                return f"{section}.{key} {json.dumps(old)} (now {json.dumps(value)})"
    if before["inputs"].keys() != now["inputs"].keys():
        return f"{len(before['inputs'])} input files (now {len(now['inputs'])}, or others)"
    changed = [path for path, mark in now["inputs"].items() if before["inputs"][path] != mark]
    return f"another content of {changed[0]}" if changed else ""
