"""Documents of a corpus, read one at a time from text, JSON Lines and parquet files, compressed or not.

for document in read_documents(find_files(["books/", "web.jsonl.zst"]), field="text"):
    document.text, document.where          # "web.jsonl.zst:17"

A text file is one document, unless `split_on` is "blank-line" (a document per block of lines) or "line"; a
JSON Lines record or a parquet row is one document, its text in `field`. A text file of more than 8 Mi
characters is cut at line ends into documents of about that size, so memory stays bounded. Text must be UTF-8;
a byte order mark is dropped, and nothing else is changed.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from tnllm.data.progress import Report, Status
from tnllm.errors import MissingExtra, RunError, UserError

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
ALLOWED = ".txt .text .md .jsonl .ndjson .json (one object a line) .parquet, also with .gz .xz .bz2 .zst"

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


def kind_of(path: Path) -> Literal["text", "jsonl", "parquet"] | None:
    """The format that a file's name announces, or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    last = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    if last in TEXT:
        return "text"
    if last in JSON_LINES:
        return "jsonl"
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
    readers = {"text": _read_text, "jsonl": _read_json_lines, "parquet": _read_parquet}
    total = sum(file.stat().st_size for file in files)
    before = count = 0
    for file in files:
        kind = kind_of(file)
        assert kind is not None, file
        for found in readers[kind](file, field, split_on):
            if isinstance(found, Document):
                count += 1
                report(Status(before + found.position, total, count))
                yield found
            elif on_bad is None:
                raise UserError(f"{found}; mend it, or leave such documents out with --on-error skip")
            else:
                on_bad(found)
        before += file.stat().st_size


def _read_json_lines(path: Path, name: str, split_on: SplitOn) -> Iterator[Document | BadDocument]:
    for number, line, position in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
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


def _read_text(path: Path, name: str, split_on: SplitOn) -> Iterator[Document | BadDocument]:
    parts: list[str] = []
    first, size, position = 1, 0, 0
    for number, line, position in _lines(path):
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


def _read_parquet(path: Path, name: str, split_on: SplitOn) -> Iterator[Document | BadDocument]:
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


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Line number from 1, the line with its end, and the bytes read so far of the file as stored."""
    number = 0
    with open(path, "rb") as raw:
        try:
            for number, line in enumerate(_unpacked(raw, path), 1):
                yield number, line.removeprefix(_BOM) if number == 1 else line, raw.tell()
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            # Damage has no error number; a disk that fails has one and is another matter.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise RunError(f"{path} is cut short or damaged after line {number}: {error}") from None


def _unpacked(raw: IO[bytes], path: Path) -> Iterable[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    return _zstd_lines(raw) if suffix == ".zst" else raw


def _zstd_lines(raw: IO[bytes]) -> Iterator[bytes]:
    # The library's own reader takes a file that is cut short for a whole one, so frames are counted here.
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("data", "zstandard") from None
    decoder = None
    rest = b""
    while chunk := raw.read(1 << 18):
        while chunk:
            decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
            try:
                data = decoder.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            chunk = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line + b"\n"
    if decoder is not None:
        raise EOFError("the last frame has no end")
    if rest:
        yield rest
