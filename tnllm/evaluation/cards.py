"""Evaluation sets with offline data: the files of each set, its source and licence, the paper's column.

    card = find_card("ceval")                # ceval-valid, through a short name
    documents, split, file = card.load(Path("data"), "val", subject="law")

A card adds data to a task of lm-evaluation-harness. Prompt, metrics and version are the harness's.
"""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from tnllm import assets
from tnllm.errors import UserError
from tnllm.evaluation.datasets import is_kind, read_rows, to_document

FOLDER = Path(__file__).parent / "tasks"
# The paper's tables (arXiv 2405.17381, Table 2): seven sets without examples, three with five. SIQA is in its text.
PAPER_GROUP = "tnl-paper"
PAPER_TASKS = {
    "boolq": 0, "piqa": 0, "social_iqa": 0, "hellaswag": 0, "winogrande": 0, "arc_easy": 0, "arc_challenge": 0,
    "openbookqa": 0, "mmlu": 5, "cmmlu": 5, "ceval-valid": 5,
}  # fmt: skip


class MissingData(UserError):
    """The documents of a task are not on this machine."""


class Card(BaseModel):
    """One evaluation set. `files` maps splits to file patterns (`{subject}` and `*` allowed); the first match is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # the harness's
    title: str
    rows: str  # kind of its rows, see datasets.py
    folder: str  # below the harness's definitions
    source: str
    licence: str
    questions: int  # in the split the harness scores
    files: dict[str, list[str]]
    aliases: list[str] = []
    also_in: list[str] = []  # folders below the data folder
    instead: dict[str, str] = {}  # split → split used if it is missing, with a line in the log
    csv_columns: list[str] = []
    subject_tasks: str | None = None  # the harness's task name of a subject
    sample: str | None = None  # of the rows in the package, if it has any
    paper: str | None = None  # column of the paper's table
    paper_metric: str = "acc"
    paper_shots: int = 0

    @property
    def sample_file(self) -> Path:
        return assets.folder() / "eval" / f"{self.name}.jsonl"

    def load(self, data_dir: Path | None, split: str, subject: str | None) -> tuple[list[dict[str, Any]], str, str]:
        """Return the documents of a split, the split used and its file; those of the packaged sample without `data_dir`.

        Raises UserError for a broken file, MissingData if there is none, with the names that were looked for.
        """
        if data_dir is None:
            return self._sample(split, subject), split, str(self.sample_file)
        looked: list[str] = []
        for used in (split, self.instead.get(split)):
            for pattern in self.files.get(used or "", []):
                looked.append(pattern.format(subject=subject))
                for path in self._paths(data_dir, looked[-1]):
                    rows = _rows(path, tuple(self.csv_columns), _stamp(path))
                    if "{subject}" not in pattern and subject is not None:
                        rows = [(location, row) for location, row in rows if row.get("subject") == subject]
                    if rows and is_kind(self.rows, rows[0][1]):
                        return (
                            [to_document(self.rows, row, location) for location, row in rows],
                            used or split,
                            str(path),
                        )
        of = f" of {subject}" if subject else ""
        raise MissingData(
            f"no {split} split{of} of {self.name} in {data_dir}; looked for {', '.join(looked) or 'nothing'} there and in "
            f"{', '.join(self._folders())}; it comes from {self.source}"
        )

    def locate(self, data_dir: Path) -> Path | None:
        """Return a file of the scored split (the first in `files`, or its substitute); None if there is none."""
        scored = next(iter(self.files))
        for split in (scored, self.instead.get(scored)):
            for pattern in self.files.get(split or "", []):
                for path in self._paths(data_dir, pattern.format(subject="*")):
                    if (rows := _rows(path, tuple(self.csv_columns), _stamp(path))) and is_kind(self.rows, rows[0][1]):
                        return path
        return None

    def _folders(self) -> list[str]:
        return list(dict.fromkeys([self.name, *self.also_in, "data"]))

    def _paths(self, data_dir: Path, pattern: str) -> list[Path]:
        """One match per folder; the caller checks by its rows whether it is this set's."""
        bases = (data_dir, *(data_dir / name for name in self._folders()))
        return [matches[0] for base in bases if (matches := sorted(base.glob(pattern)))]

    def _sample(self, split: str, subject: str | None) -> list[dict[str, Any]]:
        if self.sample is None:
            raise MissingData(
                f"no data for {self.name} (licence: {self.licence}): none ship with tnllm; give --data-dir DIR holding it, "
                f"which comes from {self.source}, or --online to download it"
            )
        rows = [(location, row) for location, row in read_rows(self.sample_file) if row["split"] == split]
        return [
            to_document(self.rows, row, location) for location, row in rows if subject in (None, row.get("subject"))
        ]

    def sample_subjects(self) -> list[str]:
        """Return the subjects of the packaged sample, in its order."""
        if self.sample is None or self.subject_tasks is None:
            return []
        return list(dict.fromkeys(row["subject"] for _, row in read_rows(self.sample_file)))


def _stamp(path: Path) -> tuple[int, ...]:
    """Modification times of the file and its labels; part of the cache key of `_rows`."""
    return tuple(file.stat().st_mtime_ns for file in sorted(path.parent.glob(f"{path.stem}*")))


@lru_cache(maxsize=4)
def _rows(path: Path, csv_columns: tuple[str, ...], stamp: tuple[int, ...]) -> list[tuple[str, dict[str, Any]]]:
    # One file may hold every subject, so the last files are cached.
    return list(read_rows(path, csv_columns))


@cache
def load_cards() -> dict[str, Card]:
    """Return every card by the harness's name of its task or group."""
    cards = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        cards[path.stem] = Card(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
    return cards


def find_card(name: str) -> Card | None:
    """Return the card with this name or alias, or None."""
    cards = load_cards()
    if name in cards:
        return cards[name]
    return next((card for card in cards.values() if name.lower() in card.aliases), None)


def subject_card(name: str) -> tuple[Card, str] | None:
    """Return card and subject of a subject's task, such as mmlu_law or ceval-valid_law, or None."""
    for card in load_cards().values():
        start = card.subject_tasks.format(subject="") if card.subject_tasks else None
        if start and name.startswith(start):
            return card, name.removeprefix(start)
    return None
