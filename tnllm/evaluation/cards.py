"""What tnllm knows of evaluation sets: where their files may lie, who published them, what the paper reports.

    card = find_card("ceval")                # ceval-valid, through a short name
    documents, place = card.load(Path("data"), "val", subject="law")

A card adds data to a task of lm-evaluation-harness; prompt, metrics and version stay the harness's own.
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


class Card(BaseModel):
    """One set. `files` maps the harness's splits to file names, `{subject}` and `*` allowed, the first found is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # the harness's
    title: str
    rows: str  # how a row is read, see rows.py
    folder: str  # of the harness's definitions
    source: str
    licence: str
    questions: int  # in the split the harness scores
    files: dict[str, list[str]]
    aliases: list[str] = []
    also_in: list[str] = []  # folders below the data folder
    instead: dict[str, str] = {}  # a split that may stand in, which is said
    csv_columns: list[str] = []
    subject_tasks: str | None = None  # the harness's task of a subject
    sample: str | None = None  # what ships in the package
    paper: str | None = None  # column of the paper's table
    paper_metric: str = "acc"
    paper_shots: int = 0

    @property
    def sample_file(self) -> Path:
        """Rows that ship in the package."""
        return assets.folder() / "eval" / f"{self.name}.jsonl"

    def load(self, data_dir: Path | None, split: str, subject: str | None) -> tuple[list[dict[str, Any]], str, str]:
        """Documents of a split, the split they really are of, and their file; without a folder the packaged sample.

        Raises UserError when there is no such file, naming those looked for and their source, or for a broken one.
        """
        if data_dir is None:
            return self._sample(split, subject), split, str(self.sample_file)
        looked: list[str] = []
        for found in (split, self.instead.get(split)):
            for pattern in self.files.get(found or "", []):
                looked.append(pattern.format(subject=subject))
                for path in self._paths(data_dir, looked[-1]):
                    rows = _rows(path, tuple(self.csv_columns), _stamp(path))
                    if "{subject}" not in pattern and subject is not None:
                        rows = [(place, row) for place, row in rows if row.get("subject") == subject]
                    if rows and is_kind(self.rows, rows[0][1]):
                        return [to_document(self.rows, row, place) for place, row in rows], found or split, str(path)
        of = f" of {subject}" if subject else ""
        raise UserError(
            f"no {split} split{of} of {self.name} in {data_dir}; looked for {', '.join(looked) or 'nothing'} there and in "
            f"{', '.join(self._folders())}; it comes from {self.source}"
        )

    def locate(self, data_dir: Path) -> Path | None:
        """A file of the split that is scored (the first of `files`, or what stands in); None if there is none."""
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
        """One file of each folder that has some; which one is this task's shows in its rows."""
        bases = (data_dir, *(data_dir / name for name in self._folders()))
        return [found[0] for base in bases if (found := sorted(base.glob(pattern)))]

    def _sample(self, split: str, subject: str | None) -> list[dict[str, Any]]:
        if self.sample is None:
            raise UserError(
                f"no data for {self.name} (licence: {self.licence}): none ship with tnllm; give --data-dir DIR holding it, "
                f"which comes from {self.source}, or --online to download it"
            )
        rows = [(place, row) for place, row in read_rows(self.sample_file) if row["split"] == split]
        return [to_document(self.rows, row, place) for place, row in rows if subject in (None, row.get("subject"))]

    def sample_subjects(self) -> list[str]:
        """Subjects in the packaged sample, in its order."""
        if self.sample is None or self.subject_tasks is None:
            return []
        return list(dict.fromkeys(row["subject"] for _, row in read_rows(self.sample_file)))


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file or its labels do."""
    return tuple(file.stat().st_mtime_ns for file in sorted(path.parent.glob(f"{path.stem}*")))


@lru_cache(maxsize=4)
def _rows(path: Path, csv_columns: tuple[str, ...], stamp: tuple[int, ...]) -> list[tuple[str, dict[str, Any]]]:
    # One file may hold every subject, so the last ones read are kept.
    return list(read_rows(path, csv_columns))


@cache
def load_cards() -> dict[str, Card]:
    """Every card, by the harness's name of the task or group."""
    cards = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        cards[path.stem] = Card(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
    return cards


def find_card(name: str) -> Card | None:
    """The card of a set, by its name or a short one; None for a task tnllm knows nothing about."""
    cards = load_cards()
    if name in cards:
        return cards[name]
    return next((card for card in cards.values() if name.lower() in card.aliases), None)


def subject_card(name: str) -> tuple[Card, str] | None:
    """The card and subject of one subject's task, such as mmlu_law or ceval-valid_law."""
    for card in load_cards().values():
        start = card.subject_tasks.format(subject="") if card.subject_tasks else None
        if start and name.startswith(start):
            return card, name.removeprefix(start)
    return None
