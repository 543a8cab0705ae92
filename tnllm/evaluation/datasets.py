"""Files of evaluation sets (JSON, JSON Lines, CSV, parquet, text), read and converted to the harness's columns.

    rows = read_rows(path, ["question", "A", "B", "C", "D", "answer"])                 # (location, row): (file:line, {...})
    documents = [to_document("mmlu", row, location) for location, row in rows]

A file may have the authors' layout or that of the Hugging Face hub; its keys tell which.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tnllm.data import parquet
from tnllm.data.documents import BadDocument, UnreadableFile
from tnllm.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path, csv_columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yield each row with its location. Labels in a file beside it (`dev-labels.lst`) become the key `label`.

    Raises UserError with file and line for anything that cannot be read.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".txt": _read_articles}
    rows = _read_csv(path, csv_columns) if path.suffix == ".csv" else readers.get(path.suffix, _read_articles)(path)
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    if not labels_file.is_file():
        yield from rows
        return
    labels = _text(labels_file).split()
    count = 0
    for count, (location, row) in enumerate(rows, 1):
        if count > len(labels):
            raise UserError(
                f"{labels_file} has {len(labels)} labels, {path.name} has more rows; they do not belong together"
            )
        yield location, {**row, "label": labels[count - 1]}
    if count != len(labels):
        raise UserError(
            f"{labels_file} has {len(labels)} labels, {path.name} has {count} rows; they do not belong together"
        )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte {error.start} of the file is not UTF-8; convert it") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            location = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{location}: not JSON ({error}); repair the line or fetch the file again") from None
            if not isinstance(row, dict):
                raise UserError(f"{location}: a JSON {type(row).__name__}; each line must be an object")
            yield location, row


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: must hold a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"{path}: entry {number}", row


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    reader = csv.reader(_text(path).splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    try:
        for values in reader:
            location = f"{path}:{reader.line_num}"
            if not values:
                continue
            if header is None:
                header = list(columns)
                if {"question", "Question"} & set(values):
                    header = values
                    continue
            if len(values) < len(header):
                raise UserError(f"{location}: {len(values)} columns, {len(header)} expected ({', '.join(header)})")
            yield location, dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        for row in parquet.read_rows(path):
            if isinstance(row, BadDocument):
                raise UserError(f"{row}; fetch the file again")
            yield f"{path}: row {row.number}", row.values
    except UnreadableFile as error:
        raise UserError(f"{error}; fetch the file again") from None


def _read_articles(path: Path) -> Iterator[tuple[str, Row]]:
    """WikiText: one article per first-level heading ` = Title = `."""
    article: list[str] = []
    start = 1
    for number, line in enumerate(_text(path).splitlines(keepends=True), 1):
        words = line.split()
        heading = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="
        if heading and any(part.strip() for part in article):
            yield f"{path}:{start}", {"page": "".join(article)}
            article, start = [], number
        article.append(line)
    if any(part.strip() for part in article):
        yield f"{path}:{start}", {"page": "".join(article)}


def _number(value: Any, allowed: Sequence[str]) -> int:
    """Return the index of a label among the allowed ones."""
    text = str(value).strip()
    if text not in allowed:
        raise ValueError(f"the answer is {value!r}; allowed: {', '.join(allowed)}")
    return allowed.index(text)


def _mmlu(row: Row) -> Row:
    choices = list(row["choices"]) if "choices" in row else [row[letter] for letter in "ABCD"]
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices; 4 expected")
    letter = str(row["answer"]).strip() in "ABCD"
    answer = _number(row["answer"], "ABCD" if letter else "0123")
    return {"question": row["question"], "subject": row.get("subject", ""), "choices": choices, "answer": answer}


def _letters(row: Row, question: str, answer: str) -> Row:
    if answer not in row:
        raise ValueError(f"there is no {answer!r}; a split without published answers cannot be scored")
    _number(row[answer], "ABCD")
    return {question: row[question], **{letter: row[letter] for letter in "ABCD"}, answer: row[answer].strip()}


def _choices(row: Row, stem: str) -> Row:
    """ARC and OpenBookQA: the harness's columns, the authors' nested question, or a query with a gold index."""
    if "query" in row:
        labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
        question = row["query"].removeprefix("Question: ")
        return {stem: question, "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}
    if isinstance(row.get("question"), dict):
        inner = row["question"]
        choices = {key: [choice[key] for choice in inner["choices"]] for key in ("text", "label")}
        row = {stem: inner["stem"], "choices": choices, "answerKey": row["answerKey"]}
    labels = [str(label) for label in row["choices"]["label"]]
    _number(row["answerKey"], labels)
    choices = {"text": list(row["choices"]["text"]), "label": labels}
    return {stem: row[stem], "choices": choices, "answerKey": str(row["answerKey"]).strip()}


def _boolq(row: Row) -> Row:
    value = row["label"] if "label" in row else row["answer"]
    if value not in (True, False, 0, 1):
        raise ValueError(f"the answer is {value!r}; allowed: true, false")
    return {"passage": row["passage"], "question": row["question"], "label": int(value)}


def _kept(*keys: str, label: str = "", form: Callable[[int], Any] = int) -> Callable[[Row], Row]:
    """A conversion that keeps `keys` and, if its values are given, the `label`, as the `form` of its index among them."""

    def convert(row: Row) -> Row:
        kept = {key: row[key] for key in keys}
        return {**kept, "label": form(_number(row["label"], label))} if label else kept

    return convert


def _winogrande(row: Row) -> Row:
    kept = {key: row[key] for key in ("sentence", "option1", "option2")}
    if "_" not in kept["sentence"]:
        raise ValueError("the sentence has no gap '_'")
    return {**kept, "answer": str(_number(row["answer"], "12") + 1)}


_DOCUMENTS: dict[str, tuple[tuple[set[str], ...], Callable[[Row], Row]]] = {
    # Sets of keys, one of which a row of this task has, and the function that converts such a row.
    "mmlu": (({"question", "choices"}, {"question", "A"}), _mmlu),
    "ceval": (({"question", "A"},), lambda row: _letters(row, "question", "answer")),
    "cmmlu": (({"Question", "A"},), lambda row: _letters(row, "Question", "Answer")),
    "arc": (
        ({"question", "choices"}, {"question", "answerKey"}, {"query", "gold"}),
        lambda row: _choices(row, "question"),
    ),
    "openbookqa": (({"question_stem"}, {"question", "answerKey"}), lambda row: _choices(row, "question_stem")),
    "boolq": (({"passage", "question"},), _boolq),
    "piqa": (({"goal", "sol1"},), _kept("goal", "sol1", "sol2", label="01")),
    "siqa": (
        ({"context", "answerA"},),
        _kept("context", "question", "answerA", "answerB", "answerC", label="123", form=lambda index: str(index + 1)),
    ),
    "hellaswag": (
        ({"ctx_a", "endings"},),
        _kept("activity_label", "ctx_a", "ctx_b", "endings", label="0123", form=str),
    ),
    "winogrande": (({"sentence", "option1"},), _winogrande),
    "sciq": (
        ({"distractor1", "support"},),
        _kept("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
    ),
    "copa": (({"premise", "choice1"},), _kept("premise", "choice1", "choice2", "question", label="01")),
    "text": (({"text"},), _kept("text")),
    "page": (({"page"},), _kept("page")),
}


def is_kind(kind: str, row: Row) -> bool:
    """Whether a row has this task's keys; several tasks name their file dev.jsonl."""
    return any(keys <= set(row) for keys in _DOCUMENTS[kind][0])


def to_document(kind: str, row: Row, location: str) -> Row:
    """Convert a row to the harness's columns. Raises UserError with its location."""
    try:
        return _DOCUMENTS[kind][1](row)
    except KeyError as error:
        raise UserError(f"{location}: there is no {error.args[0]!r} (there is: {', '.join(map(str, row))})") from None
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{location}: {error}") from None
