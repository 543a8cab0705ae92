"""The tables of a sweep: results.csv, one row a cell; curves.csv, one row a validation; and what is printed of them.

rows = read_csv(folder / RESULTS)
for line in summarize(rows): ...       # one line a choice: mean and spread over its seeds
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tnllm.errors import UserError
from tnllm.sweep.plan import Row

RESULTS, CURVES, REPEATS = "results.csv", "curves.csv", "repeats.csv"
# Columns of the accuracy at one number of pairs.
ACCURACY = "accuracy_"
_COUNTS = ("seed", "parameters", "parameters_without_embedding", "steps", "step", "tokens")
_NUMBERS = ("learning_rate", "train_loss", "val_loss", "val_bpb", "val_accuracy", "tokens_per_s", "memory_gib")


@dataclass(frozen=True)
class Line:
    """The cells of one choice that differ in the seed alone."""

    group: str
    choice: str
    recipe: str
    tokens: int
    losses: list[float]
    bits: list[float]
    accuracies: list[float]
    tokens_per_s: float
    failed: int

    @property
    def loss(self) -> float | None:
        """Mean final validation loss over seeds, in nats a token."""
        return mean(self.losses) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Largest less smallest loss; None for a single seed."""
        return max(self.losses) - min(self.losses) if len(self.losses) > 1 else None


def read_csv(path: Path) -> list[Row]:
    """Rows with their numbers as numbers; an empty field is None. Raises UserError where there is no such table."""
    if not path.is_file():
        raise UserError(f"no table {path}; a sweep writes it into its --out")
    with open(path, encoding="utf-8", newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        for key, value in row.items():
            if value == "":
                row[key] = None
            elif key in _COUNTS:
                row[key] = int(value)
            elif key in _NUMBERS or key.startswith(ACCURACY):
                row[key] = float(value)
    return rows


def summarize(rows: Sequence[Row]) -> list[Line]:
    """One line for each group and choice, in the order of the rows."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row["group"], row["choice"] or ""), []).append(row)
    lines = []
    for (group, choice), cells in together.items():
        done = [cell for cell in cells if cell["status"] == "done"]
        losses, bits = [cell["val_loss"] for cell in done], [cell["val_bpb"] for cell in done]
        accuracies = [cell["val_accuracy"] for cell in done if cell.get("val_accuracy") is not None]
        tokens, failed = max(cell["tokens"] for cell in cells), len(cells) - len(done)
        speed = mean([cell["tokens_per_s"] for cell in done]) if done else 0.0
        lines.append(Line(group, choice, cells[0]["recipe"], tokens, losses, bits, accuracies, speed, failed))
    return lines
