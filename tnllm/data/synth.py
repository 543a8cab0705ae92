"""Synthetic tasks of recall and copying, as token shards of which only the answers count as labels.

    write_task(Path("mqar"), [Task("mqar", seq_len=128, pairs=8)], tokenizer, rows=20_000, val_rows=1000, seed=0)

mqar    pairs of a key and a value, then each key once more with its value among filler; near ones are likelier, as in
        zoology's multi-query associative recall (arXiv 2312.04927)
recall  pairs drawn from a table that holds for one row; a value counts once its key was there before, as in MAD's
        in-context recall (arXiv 2403.17844)
fuzzy   the same with keys and values of one to three tokens
noisy   the same with a fifth of the pairs replaced by noise
copy    tokens scattered in noise, then a separator, then these tokens in order: MAD's selective copying

A row is a document of exactly `seq_len` tokens, its end token included, and a function of (seed, split, number). Ids mean
nothing: 3 is the separator, the next 16 are noise, then come keys and values, half of the rest each.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tnllm.data.shards import Manifest, counted_bit, token_dtype, write_manifest, write_shard
from tnllm.data.tokenize import begin_folder
from tnllm.errors import UserError
from tnllm.files import check_output_folder, only_writer
from tnllm.progress import Report, Status
from tnllm.tokenizer import Tokenizer

SHARD_ROWS = 1 << 14
_SEPARATOR, _NOISE, _NUM_NOISE = 3, 4, 16
_FIRST = _NOISE + _NUM_NOISE
_SMALLEST = _FIRST + 12
# Share of the pairs that noise replaces, and the power law of the gaps before a query.
_NOISY, _GAP_POWER = 0.2, 0.01

Row = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Task:
    """One kind of row. `pairs`: keys of a row, or tokens to copy; `vocab`: ids are below it."""

    task: str
    seq_len: int = 128
    pairs: int = 8
    vocab: int = 8192

    @property
    def keys(self) -> np.ndarray:
        return np.arange(_FIRST, (_FIRST + self.vocab) // 2)

    @property
    def values(self) -> np.ndarray:
        return np.arange((_FIRST + self.vocab) // 2, self.vocab)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError for a task that cannot be written."""
        if self.task not in TASKS:
            raise UserError(f"the task is {self.task!r}; allowed: {', '.join(TASKS)}")
        if not _SMALLEST <= self.vocab <= tokenizer.vocab_size:
            raise UserError(
                f"--vocab is {self.vocab}; give {_SMALLEST} to {tokenizer.vocab_size}, the tokenizer's pieces"
            )
        if not 1 <= self.pairs <= len(self.keys):
            raise UserError(f"--pairs is {self.pairs}; give 1 to {len(self.keys)}, the keys in --vocab {self.vocab}")
        # The end token, and for each pair its two tokens twice; copying needs each token twice, and the separator.
        needed = 2 * self.pairs + 2 if self.task == "copy" else 4 * self.pairs + 1
        if self.seq_len < needed:
            raise UserError(f"--seq-len is {self.seq_len}; {self.task} with --pairs {self.pairs} needs {needed} tokens")


def _mqar(task: Task, draw: np.random.Generator) -> Row:
    keys = draw.choice(task.keys, task.pairs, replace=False)
    values = draw.choice(task.values, task.pairs)
    ids = np.stack([keys, values], 1).flatten().tolist()
    # Filler is never a key, so every question has one answer.
    rest = draw.choice(task.values, task.seq_len - 1 - len(ids))
    slots = np.arange(1, len(rest) // 2 + 1)
    chance = slots ** (_GAP_POWER - 1)
    chosen = 2 * draw.choice(slots - 1, task.pairs, replace=False, p=chance / chance.sum())
    rest[chosen], rest[chosen + 1] = keys, values
    counted = np.zeros(len(rest), bool)
    counted[chosen + 1] = True
    return ids + rest.tolist(), [False] * len(ids) + counted.tolist()


def _table(task: Task, draw: np.random.Generator, longest: int, noise: float) -> Row:
    """Pairs of phrases of up to `longest` tokens. The first token of a key tells keys apart."""
    keys = [[int(first), *_phrase(task.keys, draw, longest - 1)] for first in draw.choice(task.keys, task.pairs, False)]
    values = [[int(draw.choice(task.values)), *_phrase(task.values, draw, longest - 1)] for _ in keys]
    ids: list[int] = []
    counted: list[bool] = []
    seen: set[int] = set()
    while len(ids) < task.seq_len - 1:
        if draw.random() < noise:
            ids += (_NOISE + draw.integers(_NUM_NOISE, size=2)).tolist()
            counted += [False, False]
            continue
        pair = int(draw.integers(task.pairs))
        ids += keys[pair] + values[pair]
        counted += [False] * len(keys[pair]) + [pair in seen] * len(values[pair])
        seen.add(pair)
    return ids[: task.seq_len - 1], counted[: task.seq_len - 1]


def _phrase(choices: np.ndarray, draw: np.random.Generator, longest: int) -> list[int]:
    return draw.choice(choices, int(draw.integers(longest + 1))).tolist()


def _copy(task: Task, draw: np.random.Generator) -> Row:
    text = draw.choice(task.values, task.pairs)
    scattered = _NOISE + draw.integers(_NUM_NOISE, size=task.seq_len - 2 - task.pairs)
    scattered[np.sort(draw.choice(len(scattered), task.pairs, replace=False))] = text
    ids = [*scattered.tolist(), _SEPARATOR, *text.tolist()]
    return ids, [False] * (len(ids) - task.pairs) + [True] * task.pairs


TASKS: dict[str, Callable[[Task, np.random.Generator], Row]] = {
    "mqar": _mqar,
    "recall": lambda task, draw: _table(task, draw, 1, 0.0),
    "fuzzy": lambda task, draw: _table(task, draw, 3, 0.0),
    "noisy": lambda task, draw: _table(task, draw, 1, _NOISY),
    "copy": _copy,
}


def make_row(task: Task, seed: int, split: str, number: int) -> Row:
    """The ids of row `number` without its end token, and which of them count as labels."""
    return TASKS[task.task](task, np.random.default_rng([seed, split == "val", number]))


def write_task(
    out: Path,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    rows: int,
    val_rows: int,
    seed: int = 0,
    overwrite: bool = False,
    report: Report = lambda status: None,
) -> Manifest:
    """Write the shards of a task, or resume what is there; the tokenizer gives the folder a vocabulary and an end token.

    Several `tasks` differ in their pairs alone, and rows are of each in turn. Raises UserError for a task that cannot be
    written and for a folder with something else.
    """
    for each in tasks:
        each.check(tokenizer)
    task = tasks[0]
    if rows < 1 or val_rows < 0:
        raise UserError(f"--rows is {rows} and --val-rows {val_rows}; give at least one row")
    check_output_folder(out, "the output")
    options = {**asdict(task), "rows": rows, "val_rows": val_rows, "seed": seed, "masked": True}
    if len(tasks) > 1:
        options["pairs"] = [each.pairs for each in tasks]
    dtype = token_dtype(tokenizer.vocab_size)
    fresh = Manifest(dtype.str, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256, options, [])
    bit = counted_bit(dtype)
    with only_writer(out):
        manifest = begin_folder(out, fresh, tokenizer, overwrite, False)
        for split, total in (("train", rows), ("val", val_rows)):
            for number, first in enumerate(range(0, total, SHARD_ROWS)):
                if any(shard.file == f"{split}-{number:05d}.bin" for shard in manifest.shards):
                    continue
                count = min(SHARD_ROWS, total - first)
                tokens = np.full((count, task.seq_len), tokenizer.eos_id, dtype)
                for row in range(count):
                    ids, counted = make_row(tasks[(first + row) % len(tasks)], seed, split, first + row)
                    tokens[row, :-1] = np.array(ids, dtype) | np.where(counted, bit, 0).astype(dtype)
                shard = write_shard(out, split, number, tokens.reshape(-1), [task.seq_len] * count, 0)
                manifest = replace(manifest, shards=[*manifest.shards, shard])
                write_manifest(out, manifest)
                made = manifest.total("documents"), manifest.total("tokens")
                total_tokens = (rows + val_rows) * task.seq_len
                report(Status(made[1] * dtype.itemsize, total_tokens * dtype.itemsize, *made))
        manifest = replace(manifest, complete=True)
        write_manifest(out, manifest)
    return manifest
