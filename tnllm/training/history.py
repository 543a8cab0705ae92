"""One history in a run folder: which checkpoint a run continues from, what changed since, and what it goes back behind.

checkpoint = choose_checkpoint(out, "auto", log)                  # None: a new run
changed = check_changes(checkpoint, recipe, before, data, allow, position, log)
roll_back(out, step, changed, owed, log)                          # later checkpoints and rows move to OUT/abandoned/
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tnllm.errors import RunError, UserError
from tnllm.files import free_name, fsync_dir, read_json, write_text_atomic
from tnllm.modeling.weights import latest_step
from tnllm.training.checkpoint import LATEST, RECIPE, find_checkpoint, list_checkpoints, step_name
from tnllm.training.metrics import METRICS, read_metrics, write_metrics
from tnllm.training.trackers import TRACKING

Log = Callable[[str], None]
# Present while later checkpoints are being moved away: the name of the step that the run goes back to.
_MARKER = "rolling-back"
# They decide which tokens a sample holds, and which documents are held out.
_DATA_KEYS = ("data.format", "data.packing", "data.seq_len", "data.val_fraction", "train.seed")
_MOST_CHANGES = 8


def check_folder(out: Path, resume: str | None) -> None:
    """Raise UserError if `out` holds a run, and `resume` is neither it nor one of its checkpoints."""
    if not (out / METRICS).exists() and not list_checkpoints(out):
        return
    if resume is None:
        raise UserError(f"{out} holds a run already; add --resume auto to resume it, or choose another --out")
    given, ours = Path(resume).resolve(), out.resolve()
    # Below abandoned/ are steps of another history than the rows and checkpoints that would stay.
    if resume != "auto" and given != ours and not given.is_relative_to(ours / "checkpoints"):
        raise UserError(
            f"{out} holds another history than --resume {resume}; choose another --out, or --resume auto to resume this one"
        )


def choose_checkpoint(out: Path, resume: str, log: Log) -> Path | None:
    """The verified checkpoint that `resume` means for the run in `out`; None where it starts.

    Raises RunError if the run has saved and nothing of that is left.
    """
    marker = out / _MARKER
    if resume == "auto" and marker.is_file():
        resume = str(out / "checkpoints" / marker.read_text(encoding="utf-8").strip())
    checkpoint = find_checkpoint(out, resume, log)
    if checkpoint is None and ((out / LATEST).exists() or (out / "weights").exists()):
        raise RunError(
            f"{out} had saved ({latest_step(out) or 'weights'}) and has no checkpoint now; put its checkpoints/ back, or "
            "choose another --out"
        )
    return checkpoint


def check_changes(
    checkpoint: Path, recipe: dict[str, Any], before: str, data: str, allow: bool, position: str, log: Log
) -> bool:
    """Log what `recipe` changes since the checkpoint; returns whether anything.

    `before` and `data` are fingerprints of the data then and now. Raises UserError if the data or its order changed,
    unless `allow`: then `position`, where reading starts, is logged.
    """
    file = checkpoint / RECIPE
    changed = dict(_changes(read_json(file), recipe)) if file.is_file() else {}
    broken = [key for key in changed if key in _DATA_KEYS or (key == "data.path" and _weights(*changed[key]))]
    if before and before != data:
        broken = broken or [key for key in changed if key.startswith("data.")] or ["the content of data.path"]
    shown = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items()]
    if broken:
        what = "; ".join(item for item in shown if item.split()[0] in broken) or broken[0]
        if not allow:
            raise UserError(
                f"changed since {checkpoint.name}: {what}; tokens would be learned twice, or held-out ones learned. Undo "
                "it, start a new run with train.init and another --out, or add --allow-data-change"
            )
        log(f"--allow-data-change: {what}; {position}")
    if changed:
        more = f" and {len(shown) - _MOST_CHANGES} more" if len(shown) > _MOST_CHANGES else ""
        log(f"changed since {checkpoint.name}: {', '.join(shown[:_MOST_CHANGES])}{more}")
    return bool(changed or broken)


def _changes(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted keys of two recipes that differ, with both values. A key that only one version of tnllm knows is no change."""
    for key in [key for key in new if key in old]:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _changes(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            yield prefix + key, (old[key], new[key])


def _weights(old: Any, new: Any) -> bool:
    """Whether two values of data.path mix in other shares."""
    weights = [[source["weight"] for source in value or [{"weight": None}]] for value in (old, new)]
    return weights[0] != weights[1]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def roll_back(out: Path, step: int, changed: bool, owed: bool, log: Log) -> None:
    """Continue the history of `out` at `step`: what came later moves to `out`/abandoned/after-STEP, which `log` names.

    Rows of metrics.jsonl without a later checkpoint are dropped instead if the recipe has not `changed`: the run repeats
    them, and if it has `owed` work, also the validation of this step. A process that dies meanwhile leaves a marker, and
    the next --resume auto takes the same step.
    """
    later = [folder for folder in list_checkpoints(out) if folder.name > step_name(step)]
    rows = read_metrics(out / METRICS)
    kept = [row for row in rows if row["step"] < step or (row["step"] == step and not (owed and "lr" not in row))]
    abandoned = [row for row in rows if row["step"] > step]
    marker = out / _MARKER
    if later or (abandoned and changed):
        if later:
            write_text_atomic(marker, step_name(step))
        target = free_name(out / "abandoned" / f"after-{step_name(step)}")
        target.mkdir(parents=True)
        write_metrics(target / METRICS, abandoned)
        named = (out / name for name in (TRACKING, *(("weights", "adapter") if later else ())))
        for path in [*reversed(later), *named]:
            if path.exists():
                os.replace(path, target / path.name)
        fsync_dir(target)
        if later:
            fsync_dir(out / "checkpoints")
            write_text_atomic(out / LATEST, f"{step_name(step)}\n")
        what = f"{len(later)} later checkpoints and " if later else ""
        log(f"{what}{len(abandoned)} rows of {METRICS} moved to {target}; the run continues from step {step}")
    if len(kept) < len(rows):
        write_metrics(out / METRICS, kept)
    marker.unlink(missing_ok=True)
