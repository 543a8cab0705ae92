"""Lines of text files, plain or compressed (.gz .xz .bz2 .zst), whole files or a byte range of a plain one.

for number, line, position in read_lines(Path("web.jsonl.zst")):
    line                       # bytes with the line end; None if longer than `max_bytes`

Every reader of a corpus opens its file by `open_stored`.
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

from tnllm.data.documents import UnreadableFile
from tnllm.errors import optional_import
from tnllm.files import format_bytes

SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_BOM = b"\xef\xbb\xbf"
# The format's own limit, that of `zstd --long=31`; the library's default is 2^27.
_MAX_ZSTD_WINDOW = 1 << 31


def open_stored(path: Path) -> IO[bytes]:
    """Open a corpus file to read its bytes as they are stored."""
    return open(path, "rb")


def stored_size(path: Path) -> int:
    return path.stat().st_size


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

    A byte order mark at the start is dropped. Raises UnreadableFile for a file that is cut short or damaged.
    """
    span = span or Span(0, sys.maxsize)
    max_bytes = max_bytes or sys.maxsize
    number = span.first_line - 1
    with open_stored(path) as raw, damage_as_unreadable(lambda: f"{path} is cut short or damaged after line {number}"):
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
    """All bytes of a file, decompressed. Raises UnreadableFile for a file that is cut short or damaged."""
    with open_stored(path) as raw, damage_as_unreadable(lambda: f"{path} is cut short or damaged"):
        return decompressed(raw, path).read()


@contextmanager
def damage_as_unreadable(message: Callable[[], str]) -> Iterator[None]:
    """Turn what decompressors and parsers raise for damaged data into UnreadableFile(`message()`: cause)."""
    try:
        yield
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        # Damaged data raises an OSError without an errno; a failing disk sets one, and that error is passed on.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableFile(f"{message()}: {error}") from None


def decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    """Wrap an open file in the decompressor that its name asks for."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        # gzip's reader takes an empty file for an empty text.
        if not stored_size(path):
            raise EOFError("the file is empty")
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".xz":
        # The format allows zero bytes between streams and at the end.
        frames = _FrameReader(raw, lambda head: lzma.LZMADecompressor(), padding=b"\0")
    elif suffix == ".bz2":
        frames = _FrameReader(raw, lambda head: bz2.BZ2Decompressor())
    elif suffix == ".zst":
        frames = _FrameReader(raw, _zstd_decoder(path))
    else:
        return raw
    return io.BufferedReader(frames, 1 << 18)


class _FrameReader(io.RawIOBase):
    """Decompressed bytes of frames one after another.

    The readers of lzma and bz2 end without a word at junk after the first frame, and zstandard's at a file that ends inside
    one; here both are errors. `new_decoder` gets the first bytes of each frame.
    """

    def __init__(self, raw: IO[bytes], new_decoder: Callable[[bytes], Any], padding: bytes = b"") -> None:
        self._raw, self._new_decoder, self._padding = raw, new_decoder, padding
        self._decoder: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self._is_empty = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            # Few bytes at a time: a block may grow to thousands of times its size.
            data = self._input or self._raw.read(1 << 13)
            if not data:
                if self._decoder is not None or self._is_empty:
                    raise EOFError("the file is empty" if self._is_empty else "the last frame has no end")
                return 0
            self._is_empty = False
            if self._decoder is None and self._padding and not (data := data.lstrip(self._padding)):
                self._input = b""
                continue
            decoder = self._decoder = self._decoder or self._new_decoder(data)
            self._output = memoryview(decoder.decompress(data))
            self._input = decoder.unused_data if decoder.eof else b""
            self._decoder = None if decoder.eof else decoder
        # A view: the output of one input block may be thousands of times larger than `buffer`.
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _zstd_window(head: bytes) -> int:
    """The window in bytes that a frame asks for, by RFC 8878, section 3.1.1.1; 0 if it names none.

    zstandard's own parser refuses windows above the limit without saying how large they are.
    """
    is_frame = len(head) > 5 and head[:4] == b"\x28\xb5\x2f\xfd"
    if not is_frame or head[4] & 0x20:
        return 0
    base = 1 << (10 + (head[5] >> 3))
    return base + base // 8 * (head[5] & 7)


def _zstd_decoder(path: Path) -> Callable[[bytes], Any]:
    with optional_import("data", "zstandard"):
        import zstandard

    class Decoder:
        """A decompression object whose errors say what is wrong: the data, or what the decoder was given."""

        def __init__(self, head: bytes) -> None:
            self._window = _zstd_window(head)
            if self._window > _MAX_ZSTD_WINDOW:
                raise UnreadableFile(
                    f"{path} needs a window of {format_bytes(self._window)}, more than zstd's own limit of "
                    f"{format_bytes(_MAX_ZSTD_WINDOW)}; compress it again with --long=31 or less"
                )
            self._inner = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()

        def decompress(self, data: bytes) -> bytes:
            try:
                return self._inner.decompress(data)
            except (zstandard.ZstdError, MemoryError) as error:
                if "ictionary" in str(error):
                    raise UnreadableFile(
                        f"{path} was compressed with a dictionary, which it does not hold; decompress it with zstd -D first"
                    ) from None
                if "memory" in str(error).lower() or isinstance(error, MemoryError):
                    raise UnreadableFile(
                        f"{path} needs a window of {format_bytes(self._window)}, for which there is not enough memory"
                    ) from None
                raise EOFError(str(error)) from None

        @property
        def eof(self) -> bool:
            return self._inner.eof

        @property
        def unused_data(self) -> bytes:
            return self._inner.unused_data

    return Decoder
