"""Views of metrics.jsonl elsewhere: TensorBoard, Weights & Biases, trackio. Each is optional, and none can stop a run.

check_trackers(config.log)                                     # before any work: MissingExtra
with Trackers(out, config.log, recipe, step, log) as trackers:
    trackers.write(row)                                        # of metrics.jsonl: same names, same step
"""

import contextlib
import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tnllm.errors import MissingExtra, Terminated
from tnllm.files import write_text_atomic
from tnllm.training.metrics import METRICS, read_metrics
from tnllm.training.sections import LogSection

# The identity of this history in the trackers. It moves away with the rows that a resume goes back behind.
TRACKING = "tracking.json"
_EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio"}

Write = Callable[[dict[str, Any], int], Any]  # values, step
Close = Callable[[bool], Any]  # whether the run failed


def check_trackers(section: LogSection) -> None:
    """Raise MissingExtra for a tracker that is switched on and not installed."""
    for name, extra in _EXTRAS.items():
        if getattr(section, name) and importlib.util.find_spec(name) is None:
            raise MissingExtra(extra, name)


class Trackers:
    """Writes rows to all trackers of `section`. One that fails costs a line of `log`, and the run continues without it.

    A run that resumes in `out` continues the same run of a tracker. A new one first gets the rows that are there.
    """

    def __init__(
        self, out: Path, section: LogSection, recipe: dict[str, Any], step: int, log: Callable[[str], None]
    ) -> None:
        self._out, self._section, self._recipe, self._step, self._log = out, section, recipe, step, log
        self._open: dict[str, tuple[Write, Close]] = {}

    def __enter__(self) -> "Trackers":
        names = [name for name in _EXTRAS if getattr(self._section, name)]
        if not names:
            return self
        identity, known = _read_tracking(self._out / TRACKING)
        for name in names:
            rows = [] if name in known else read_metrics(self._out / METRICS)
            self._guarded(name, self._start, name, identity, rows)
        tracking = {"id": identity, "trackers": sorted({*known, *self._open})}
        write_text_atomic(self._out / TRACKING, json.dumps(tracking) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None and not issubclass(kind, Terminated | KeyboardInterrupt)
        for name, (_, close) in list(self._open.items()):
            self._guarded(name, close, failed)

    def write(self, row: dict[str, Any]) -> None:
        """The values of a row of metrics.jsonl, at its step."""
        for name, (write, _) in list(self._open.items()):
            self._guarded(name, write, _values(row), row["step"])

    def _start(self, name: str, identity: str, rows: list[dict[str, Any]]) -> None:
        openers = {"tensorboard": self._tensorboard, "wandb": self._wandb, "trackio": self._trackio}
        write, close = openers[name](identity, f"{self._out.resolve().name}-{identity}")
        for row in rows:
            write(_values(row), row["step"])
        self._open[name] = write, close

    def _guarded(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            # Standard output belongs to the command.
            with contextlib.redirect_stdout(sys.stderr):
                action(*arguments)
        # What another program does wrong must not end the run; some exit where they should raise.
        except (Exception, SystemExit) as error:
            self._open.pop(name, None)
            reason = (str(error).strip().splitlines() or [""])[0]
            self._log(f"log.{name} failed ({type(error).__name__}: {reason}); the run continues without it")

    def _tensorboard(self, identity: str, name: str) -> tuple[Write, Close]:
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(str(self._out / "tensorboard"), purge_step=self._step + 1)

        def write(values: dict[str, Any], step: int) -> None:
            for key, value in values.items():
                events.add_scalar(key, value, step)

        return write, lambda failed: events.close()

    def _wandb(self, identity: str, name: str) -> tuple[Write, Close]:
        import wandb

        run = wandb.init(
            project=self._section.project,
            name=name,
            id=identity,
            resume="allow",
            dir=str(self._out),
            config=self._recipe,
            # train.log has the lines already.
            settings=wandb.Settings(console="off"),
        )
        return lambda values, step: run.log(values, step=step), lambda failed: run.finish(exit_code=int(failed))

    def _trackio(self, identity: str, name: str) -> tuple[Write, Close]:
        import trackio

        # It knows runs by their names only.
        run = trackio.init(project=self._section.project, name=name, resume="allow", config=self._recipe)
        return lambda values, step: run.log(values, step=step), lambda failed: trackio.finish()


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and key not in ("step", "time")}


def _read_tracking(path: Path) -> tuple[str, list[str]]:
    """The identity of the run in `out`, and the trackers that know it; a new one if the file is missing or damaged."""
    try:
        tracking = json.loads(path.read_bytes())
        identity, known = tracking["id"], tracking["trackers"]
        if re.fullmatch("[0-9a-f]{8}", identity):
            return identity, [name for name in _EXTRAS if name in known]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return uuid.uuid4().hex[:8], []
