"""Corpus files, and the documents of one, read one at a time: text, JSON Lines, parquet and WARC, compressed or not.

for path in find_files(["books/", "web.jsonl.zst"]):
    for item in read_file(path, field="text"):
        item                    # a Document, or a BadDocument that says why; `remote.read_documents` reads many files

A text file is one document, unless `split_on` is "blank-line" (a document per block of lines) or "line". A JSON Lines
record, a parquet row and a page of a WARC or WET archive are one document each, with the text in `field`. A text file of
more than 8 Mi characters is cut at line ends into documents of about that size, so memory stays bounded. Text must be
UTF-8; a byte order mark is dropped and nothing else is changed, except that a WARC's HTML is reduced to its main text.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tnllm import assets
from tnllm.data import compressed
from tnllm.data.compressed import Line, Span, read_lines, stored_size
from tnllm.data.documents import BadDocument, Document, UnreadableFile, json_type
from tnllm.data.folders import files_below, is_unicode, shown
from tnllm.data.parquet import read_rows
from tnllm.data.warc import read_archive
from tnllm.errors import UserError
from tnllm.files import format_bytes
from tnllm.progress import log

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
ARCHIVES = (".warc", ".wet")
ALLOWED = ".txt .text .md .jsonl .ndjson .json (one object a line) .parquet .warc .wet, also with .gz .xz .bz2 .zst"

Kind = Literal["text", "jsonl", "parquet", "archive"]
SplitOn = Literal["none", "blank-line", "line"]
_MAX_TEXT_CHARS = 8 << 20
# NaN and infinities, which only Python's JSON has, become null.
_JSON = json.JSONDecoder(parse_constant=lambda name: None)
_MAX_DIGITS = 4300
_JSON_LONG_NUMBERS = json.JSONDecoder(
    parse_constant=lambda name: None,
    parse_int=lambda digits: int(digits) if len(digits.lstrip("-")) <= _MAX_DIGITS else None,
)


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


def find_files(inputs: Iterable[str | Path], leave_out: Path | None = None) -> list[Path]:
    """Corpus files of `inputs` in order; a folder stands for the corpus files below it, sorted by path.

    The names of corpora that ship (`assets.named`) stand for their files. Linked folders are followed; hidden files in
    folders are skipped, and so are bare .json files, which tend to be metadata, and the folder `leave_out`, into which the
    caller writes. Raises UserError for an input that does not exist, has an unknown format or is given twice, and for a
    folder without any corpus file.
    """
    files: dict[Path, None] = {}
    for given in map(_meant, inputs):
        if given.is_dir():
            paths = files_below(given, is_corpus_file, leave_out)
            if not paths:
                raise UserError(f"{given} holds no corpus file; allowed: {ALLOWED}")
        elif not given.exists():
            raise UserError(f"no such file or folder: {given} ({assets.SHIPPED})")
        elif not is_unicode(str(given)):
            raise UserError(f"{shown(given)} has a name that is not UTF-8; rename it")
        elif kind_of(given) is None:
            raise UserError(f"{given} is not in a known corpus format; allowed: {ALLOWED}")
        else:
            paths = [given]
        for path in paths:
            if path in files:
                raise UserError(f"{path} is given twice; name each file once")
            files[path] = None
    return list(files)


def _meant(given: str | Path) -> Path:
    path = assets.named(given)
    if path != Path(given) and Path(given).exists():
        log(f"{given} means the corpus that ships; write ./{given} for the one in this folder")
    return path


def is_corpus_file(path: Path) -> bool:
    """Whether a folder's file of this name belongs to the corpus in it."""
    return not path.name.startswith(".") and path.suffix.lower() != ".json" and kind_of(path) is not None


def read_file(
    path: Path,
    field: str = "text",
    split_on: SplitOn = "none",
    span: Span | None = None,
    max_line_bytes: int | None = None,
    more: Sequence[str] | None = None,
) -> Iterator[Document | BadDocument]:
    """The documents and unreadable records of one file, or of a `span` of it.

    Where the file is damaged, a BadDocument stands for the rest of it. A line of more than `max_line_bytes` becomes a
    BadDocument and is never held in memory. Of a parquet file only the columns `field` and `more` are read (None: all); the
    other formats give every field.
    """
    kind = kind_of(path)
    assert kind is not None, path
    too_long = f"the line is longer than {format_bytes(max_line_bytes or 0)} (input.max_line_mb)"
    try:
        if kind == "parquet":
            yield from _read_parquet(path, field, more)
        elif kind == "archive":
            yield from read_archive(path)
        elif kind == "text":
            yield from _read_text(path, split_on, read_lines(path, span, max_line_bytes), too_long)
        else:
            yield from _read_json_lines(path, field, read_lines(path, span, max_line_bytes), too_long)
    except UnreadableFile as error:
        yield BadDocument(str(path), str(error), is_damage=True)


def _read_json_lines(path: Path, name: str, lines: Iterator[Line], too_long: str) -> Iterator[Document | BadDocument]:
    for number, line, position in lines:
        where = f"{path}:{number}"
        if line is None:
            yield BadDocument(where, too_long)
            continue
        if not line.strip():
            continue
        text, why = _text_of(line)
        if why:
            yield BadDocument(where, why)
            continue
        try:
            record = _decode(text.strip())
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip().startswith(b"["):
                yield BadDocument(str(path), f"{path} is one JSON array; write one object a line (jq -c '.[]')")
                return
            yield BadDocument(where, f"invalid JSON ({error.msg}, column {error.colno})")
            continue
        except RecursionError:
            yield BadDocument(where, "JSON that is nested too deeply to be read")
            continue
        if not isinstance(record, dict):
            yield BadDocument(where, f"{json_type(record)} where an object is expected")
            continue
        # Only an escape can spell a lone surrogate: the bytes are UTF-8.
        lost = _not_unicode(record, name) if b"\\ud" in line or b"\\uD" in line else {}
        yield _from_record(record, name, path, number, position, lost)


def _text_of(line: bytes) -> tuple[str, str]:
    """A line as text and "", or "" and why it is not UTF-8."""
    # ASCII in UTF-16 or UTF-32 is valid UTF-8, with a NUL beside every letter.
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or line.count(0) * 4 >= len(line) > 0:
        return "", "UTF-16, UTF-32 or mostly NUL bytes; convert the file to UTF-8"
    try:
        return line.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start + 1} of the line)"


def _decode(line: str) -> Any:
    try:
        return _JSON.decode(line)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python reads no integer of more than 4,300 digits. A function for each integer would slow down every file.
        return _JSON_LONG_NUMBERS.decode(line)


def _from_record(
    record: dict[str, Any], name: str, path: Path, line: int, position: int, lost: dict[str, str]
) -> Document | BadDocument:
    where = f"{path}:{line}"
    if name in lost:
        return BadDocument(where, f"field {name!r} is {lost[name]}")
    if name not in record:
        fields = ", ".join(map(str, list(record)[:8])) or "none"
        return BadDocument(where, f"no field {name!r} (fields: {fields}; choose one of them)")
    text = record.pop(name)
    if not isinstance(text, str):
        return BadDocument(where, f"field {name!r} is {json_type(text)}, not text")
    if not is_unicode(text):
        return BadDocument(where, f"field {name!r} holds a lone surrogate, which is not Unicode text")
    return Document(text, path, line, position, record, lost)


def _not_unicode(record: dict[str, Any], text_field: str) -> dict[str, str]:
    """Take the fields with lone surrogates out of the record; returns them with the reason."""
    lost = {}
    for key in [key for key in record if key != text_field]:
        if not is_unicode(key + json.dumps(record[key], ensure_ascii=False)):
            del record[key]
            lost[key.encode("utf-8", "replace").decode()] = "holding a lone surrogate, which is not Unicode text"
    return lost


def _read_text(path: Path, split_on: SplitOn, lines: Iterator[Line], too_long: str) -> Iterator[Document | BadDocument]:
    parts: list[str] = []
    first, size, position = 1, 0, 0
    for number, line, position in lines:
        if line is None:
            yield BadDocument(f"{path}:{number}", too_long)
            continue
        text, why = _text_of(line)
        if why:
            yield BadDocument(f"{path}:{number}", why)
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


def _read_parquet(path: Path, name: str, more: Sequence[str] | None) -> Iterator[Document | BadDocument]:
    size = stored_size(path)
    for row in read_rows(path, name, more):
        if isinstance(row, BadDocument):
            yield row
        else:
            yield _from_record(row.values, name, path, row.number, int(size * row.share), row.lost)
