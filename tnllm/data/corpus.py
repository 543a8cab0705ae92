"""Documents of a corpus, read one at a time from text, JSON Lines and parquet files, compressed or not.

for document in read_documents(find_files(["books/", "web.jsonl.zst"]), field="text"):
    document.text, document.where          # "web.jsonl.zst:17"

A text file is one document, unless `split_on` is "blank-line" (a document per block of lines) or "line"; a
JSON Lines record, a parquet row or a page of a WARC or WET archive is one document, its text in `field`. A text
file of more than 8 Mi characters is cut at line ends into documents of about that size, so memory stays bounded.
Text must be UTF-8; a byte order mark is dropped, and nothing else is changed (pages of a WARC are HTML, whose main
text is taken).
"""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from tnllm.errors import MissingExtra, RunError, UserError
from tnllm.progress import Report, Status

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
ARCHIVES = (".warc", ".wet")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
ALLOWED = ".txt .text .md .jsonl .ndjson .json (one object a line) .parquet .warc .wet, also with .gz .xz .bz2 .zst"

SplitOn = Literal["none", "blank-line", "line"]
_MAX_TEXT_CHARS = 8 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One document: its text, where it starts (`file`, `line` counted from 1) and its other fields.

    `position` is how many bytes of the file, as stored, had been read when it was complete.
    """

    text: str
    file: Path
    line: int
    position: int
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadDocument:
    """Something at `where` is no document; `reason` says why. Reading can go on after it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of an unpacked text or JSON Lines file, both at line ends; `first_line` from 1."""

    start: int
    end: int
    first_line: int = 1


# A line's number from 1, its bytes (None: longer than allowed), and the bytes of the file read so far.
Line = tuple[int, bytes | None, int]
Kind = Literal["text", "jsonl", "parquet", "archive"]


def kind_of(path: Path) -> Kind | None:
    """The format that a file's name announces, or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    last = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    if last in TEXT:
        return "text"
    if last in JSON_LINES:
        return "jsonl"
    if last in ARCHIVES and (not compressed or suffixes[-1] == ".gz"):
        return "archive"
    return "parquet" if last in PARQUET and not compressed else None


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Corpus files of `inputs` in order; a folder stands for the corpus files below it, sorted by path.

    In folders hidden files and bare .json files, which tend to be metadata, are passed over. Raises UserError
    for an input that does not exist, is of no known format or is given twice, and for a folder without any.
    """
    files: dict[Path, None] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if _is_corpus_file(path, given))
            if not found:
                raise UserError(f"{given} holds no corpus file; allowed: {ALLOWED}")
        elif not given.exists():
            raise UserError(f"no such file or folder: {given}")
        elif kind_of(given) is None:
            raise UserError(f"{given} is of no known corpus format; allowed: {ALLOWED}")
        else:
            found = [given]
        for path in found:
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
    """Every document of `files` in order, empty ones included; `report` hears of each.

    What is no document (invalid JSON, a missing or non-string field, text that is not UTF-8) goes to `on_bad`
    and reading goes on; without `on_bad` it raises UserError naming file and line. A file that ends too early
    or cannot be unpacked raises RunError.
    """
    total = sum(file.stat().st_size for file in files)
    before = count = 0
    for file in files:
        for found in read_file(file, field, split_on):
            if isinstance(found, Document):
                count += 1
                report(Status(before + found.position, total, count))
                yield found
            elif on_bad is None:
                raise UserError(f"{found}; mend it, or leave such documents out with --on-error skip")
            else:
                on_bad(found)
        before += file.stat().st_size


def read_file(
    path: Path,
    field: str = "text",
    split_on: SplitOn = "none",
    span: Span | None = None,
    max_line_bytes: int | None = None,
) -> Iterator[Document | BadDocument]:
    """Every document of one file, or of a `span` of it, and what is none. Raises RunError where the file is damaged.

    A line of more than `max_line_bytes` is passed over without ever being held, as a BadDocument.
    """
    kind = kind_of(path)
    assert kind is not None, path
    if kind == "parquet":
        return _read_parquet(path, field)
    if kind == "archive":
        from tnllm.data.warc import read_archive

        return read_archive(path)
    lines = lines_of(path, span, max_line_bytes)
    return _read_text(path, split_on, lines) if kind == "text" else _read_json_lines(path, field, lines)


def _read_json_lines(path: Path, name: str, lines: Iterator[Line]) -> Iterator[Document | BadDocument]:
    for number, line, position in lines:
        where = f"{path}:{number}"
        if line is None:
            yield BadDocument(where, "a line beyond the length allowed")
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
        return BadDocument(where, f"field {name!r} holds a lone surrogate, which is no Unicode text")
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
            yield BadDocument(f"{path}:{number}", "a line beyond the length allowed")
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
        raise RunError(f"{path} is no whole parquet file: {str(error).splitlines()[0]}") from None


def lines_of(path: Path, span: Span | None = None, max_bytes: int | None = None) -> Iterator[Line]:
    """Line number, the line with its end (None: it is too long), and the bytes read so far of the file as stored.

    Raises RunError for a file that is cut short or damaged.
    """
    span = span or Span(0, sys.maxsize)
    max_bytes = max_bytes or sys.maxsize
    number = span.first_line - 1
    with open(path, "rb") as raw:
        try:
            raw.seek(span.start)
            source = _unpacked(raw, path)
            while raw.tell() < span.end and (line := source.readline(max_bytes)):
                number += 1
                too_long = len(line) >= max_bytes and not line.endswith(b"\n")
                while too_long and line and not line.endswith(b"\n"):
                    line = source.readline(1 << 20)
                if number == 1:
                    line = line.removeprefix(_BOM)
                yield number, None if too_long else line, raw.tell()
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            # Damage has no error number; a disk that fails has one and is another matter.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise RunError(f"{path} is cut short or damaged after line {number}: {error}") from None


def _unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    return io.BufferedReader(_Zstd(raw), 1 << 18) if suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """Unpacked bytes of zstd frames. The library's own reader takes a file that is cut short for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingExtra("data", "zstandard") from None
        self._zstandard, self._raw = zstandard, raw
        self._decoder: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(1 << 16)
            if not self._packed:
                if self._decoder is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._decoder = self._decoder or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._decoder.decompress(self._packed)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._packed = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
