"""Lines of text files, plain or compressed (.gz .xz .bz2 .zst), whole files or a byte range of a plain one.

for number, line, position in read_lines(Path("web.jsonl.zst")):
    line                       # bytes with the line end; None if longer than `max_bytes`
"""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tnllm.errors import MissingExtra, RunError

SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a plain text or JSON Lines file, both at line ends; `first_line` counts from 1."""

    start: int
    end: int
    first_line: int = 1


# A line's number from 1, its bytes (None: longer than allowed), and the bytes of the file read so far.
Line = tuple[int, bytes | None, int]


def read_lines(path: Path, span: Span | None = None, max_bytes: int | None = None) -> Iterator[Line]:
    """Yield each line's number, its bytes with the line end (None if too long) and the stored bytes read so far.

    A byte order mark at the start is dropped. Raises RunError for a file that is cut short or damaged.
    """
    span = span or Span(0, sys.maxsize)
    max_bytes = max_bytes or sys.maxsize
    number = span.first_line - 1
    with open(path, "rb") as raw, damage_as_run_error(lambda: f"{path} is cut short or damaged after line {number}"):
        raw.seek(span.start)
        source = decompressed(raw, path)
        while raw.tell() < span.end and (line := source.readline(max_bytes)):
            number += 1
            too_long = len(line) >= max_bytes and not line.endswith(b"\n")
            while too_long and line and not line.endswith(b"\n"):
                line = source.readline(1 << 20)
            if number == 1:
                line = line.removeprefix(_BOM)
            yield number, None if too_long else line, raw.tell()


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, decompressed. Raises RunError for a file that is cut short or damaged."""
    with open(path, "rb") as raw, damage_as_run_error(lambda: f"{path} is cut short or damaged"):
        return decompressed(raw, path).read()


@contextmanager
def damage_as_run_error(message: Callable[[], str]) -> Iterator[None]:
    """Turn what decompressors and parsers raise for damaged data into RunError(`message()`: cause)."""
    try:
        yield
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        # Damaged data raises an OSError without an errno; a failing disk sets one, and that error is passed on.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RunError(f"{message()}: {error}") from None


def decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    """Wrap an open file in the decompressor that its name asks for."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    return io.BufferedReader(_ZstdReader(raw), 1 << 18) if suffix == ".zst" else raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of zstd frames. zstandard's own reader does not notice a file that ends inside a frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingExtra("data", "zstandard") from None
        self._zstandard, self._raw = zstandard, raw
        self._decoder: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._decoder is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._decoder = self._decoder or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = self._decoder.decompress(self._input)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._input = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
