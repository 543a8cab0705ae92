"""Documents of a corpus, read one at a time from text, JSON Lines, parquet and WARC files, compressed or not.

for document in read_documents(find_files(["books/", "web.jsonl.zst"]), field="text"):
    document.text, document.where          # "web.jsonl.zst:17"

A text file is one document, unless `split_on` is "blank-line" (a document per block of lines) or "line". A JSON Lines
record, a parquet row and a page of a WARC or WET archive are one document each, with the text in `field`. A text file of
more than 8 Mi characters is cut at line ends into documents of about that size, so memory stays bounded. Text must be
UTF-8; a byte order mark is dropped and nothing else is changed, except that a WARC's HTML is reduced to its main text.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tnllm.data import compressed
from tnllm.data.compressed import Line, Span, read_lines
from tnllm.data.documents import BadDocument, Document
from tnllm.data.warc import read_archive
from tnllm.errors import MissingExtra, RunError, UserError
from tnllm.progress import Report, Status

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
ARCHIVES = (".warc", ".wet")
ALLOWED = ".txt .text .md .jsonl .ndjson .json (one object a line) .parquet .warc .wet, also with .gz .xz .bz2 .zst"

Kind = Literal["text", "jsonl", "parquet", "archive"]
SplitOn = Literal["none", "blank-line", "line"]
_MAX_TEXT_CHARS = 8 << 20


def kind_of(path: Path) -> Kind | None:
    """The format that a file's name says, or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in compressed.SUFFIXES
    suffix = "".join(suffixes[-2:-1] if is_compressed else suffixes[-1:])
    if suffix in TEXT:
        return "text"
    if suffix in JSON_LINES:
        return "jsonl"
    if suffix in ARCHIVES and (not is_compressed or suffixes[-1] == ".gz"):
        return "archive"
    return "parquet" if suffix in PARQUET and not is_compressed else None


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Corpus files of `inputs` in order; a folder stands for the corpus files below it, sorted by path.

    Hidden files in folders are skipped, and so are bare .json files, which tend to be metadata. Raises UserError for an
    input that does not exist, has an unknown format or is given twice, and for a folder without any corpus file.
    """
    files: dict[Path, None] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            paths = sorted(path for path in given.rglob("*") if _is_corpus_file(path, given))
            if not paths:
                raise UserError(f"{given} holds no corpus file; allowed: {ALLOWED}")
        elif not given.exists():
            raise UserError(f"no such file or folder: {given}")
        elif kind_of(given) is None:
            raise UserError(f"{given} is not in a known corpus format; allowed: {ALLOWED}")
        else:
            paths = [given]
        for path in paths:
            if path in files:
                raise UserError(f"{path} is given twice; name each file once")
            files[path] = None
    return list(files)


def _is_corpus_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() != ".json" and kind_of(path) is not None and path.is_file()


def read_documents(
    files: Sequence[Path],
    field: str = "text",
    split_on: SplitOn = "none",
    on_bad: Callable[[BadDocument], None] | None = None,
    report: Report = lambda status: None,
) -> Iterator[Document]:
    """Every document of `files` in order, empty ones included; `report` is called after each.

    A record that cannot be read (invalid JSON, a missing or non-string field, text that is not UTF-8) goes to `on_bad` and
    reading continues; without `on_bad` it raises UserError with file and line. A file that ends too early or cannot be
    decompressed raises RunError.
    """
    total = sum(file.stat().st_size for file in files)
    before = count = 0
    for file in files:
        for item in read_file(file, field, split_on):
            if isinstance(item, Document):
                count += 1
                report(Status(before + item.position, total, count))
                yield item
            elif on_bad is None:
                raise UserError(f"{item}; fix it, or leave such documents out with --on-error skip")
            else:
                on_bad(item)
        before += file.stat().st_size


def read_file(
    path: Path,
    field: str = "text",
    split_on: SplitOn = "none",
    span: Span | None = None,
    max_line_bytes: int | None = None,
) -> Iterator[Document | BadDocument]:
    """The documents and unreadable records of one file, or of a `span` of it. Raises RunError where the file is damaged.

    A line of more than `max_line_bytes` becomes a BadDocument and is never held in memory.
    """
    kind = kind_of(path)
    assert kind is not None, path
    if kind == "parquet":
        return _read_parquet(path, field)
    if kind == "archive":
        return read_archive(path)
    lines = read_lines(path, span, max_line_bytes)
    return _read_text(path, split_on, lines) if kind == "text" else _read_json_lines(path, field, lines)


def _read_json_lines(path: Path, name: str, lines: Iterator[Line]) -> Iterator[Document | BadDocument]:
    for number, line, position in lines:
        where = f"{path}:{number}"
        if line is None:
            yield BadDocument(where, "the line is longer than allowed")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            yield BadDocument(where, f"not UTF-8 (byte {error.start + 1} of the line)")
            continue
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip().startswith(b"["):
                raise UserError(f"{path} is one JSON array; write one object a line (jq -c '.[]')") from None
            yield BadDocument(where, f"invalid JSON ({error.msg}, column {error.colno})")
            continue
        except (ValueError, RecursionError) as error:
            yield BadDocument(where, f"JSON that cannot be read ({error})")
            continue
        if not isinstance(record, dict):
            yield BadDocument(where, f"a JSON {type(record).__name__} where an object is expected")
            continue
        yield _from_record(record, name, path, number, position)


def _from_record(record: dict[str, Any], name: str, path: Path, line: int, position: int) -> Document | BadDocument:
    where = f"{path}:{line}"
    if name not in record:
        fields = ", ".join(map(str, list(record)[:8])) or "none"
        return BadDocument(where, f"no field {name!r} (fields: {fields}; choose one with --field)")
    text = record.pop(name)
    if not isinstance(text, str):
        return BadDocument(where, f"field {name!r} is a {type(text).__name__}, not text")
    if not _is_unicode(text):
        return BadDocument(where, f"field {name!r} holds a lone surrogate, which is not Unicode text")
    return Document(text, path, line, position, record)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path, split_on: SplitOn, lines: Iterator[Line]) -> Iterator[Document | BadDocument]:
    parts: list[str] = []
    first, size, position = 1, 0, 0
    for number, line, position in lines:
        if line is None:
            yield BadDocument(f"{path}:{number}", "the line is longer than allowed")
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadDocument(f"{path}:{number}", f"not UTF-8 (byte {error.start + 1} of the line)")
            continue
        blank = split_on == "blank-line" and not text.strip()
        if not blank:
            first = first if parts else number
            parts.append(text)
            size += len(text)
        if parts and (blank or split_on == "line" or size >= _MAX_TEXT_CHARS):
            yield _text_document(parts, path, first, position, split_on)
            parts, size = [], 0
    if parts:
        yield _text_document(parts, path, first, position, split_on)


def _text_document(parts: list[str], path: Path, line: int, position: int, split_on: SplitOn) -> Document:
    text = "".join(parts)
    return Document(text if split_on == "none" else text.rstrip("\r\n"), path, line, position)


def _read_parquet(path: Path, name: str) -> Iterator[Document | BadDocument]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    size, number = path.stat().st_size, 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        rows = max(table.metadata.num_rows, 1)
        if name not in table.schema_arrow.names:
            fields = ", ".join(table.schema_arrow.names[:8])
            raise UserError(f"{path} has no column {name!r} (columns: {fields}); choose one with --field")
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield _from_record(record, name, path, number, size * number // rows)
    except UnicodeDecodeError:
        raise RunError(f"{path} holds text that is not UTF-8 after row {number}") from None
    except pyarrow.ArrowInvalid as error:
        raise RunError(f"{path} is not a complete parquet file: {str(error).splitlines()[0]}") from None
