"""The input cut into shards, the units of work, and the files of a cleaning run: JSON Lines written whole or not at all.

shards = plan_shards(find_files(["web/"]), shard_bytes=64 << 20)   # files, and spans of large plain ones
with Lines(folder / "00000.jsonl.gz") as lines:                   # renamed into place when the block ends well
    lines.write({"text": "..."})
for record in read_lines(folder / "00000.jsonl.gz"): ...
"""

import fcntl
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tnllm.data.corpus import Span, kind_of, lines_of
from tnllm.errors import RunError, UserError
from tnllm.files import fsync_dir

_EDGE_BYTES = 1 << 16
# The field of a rejected record that says where and why: step, reason and figures.
REJECTED = "rejected"


@dataclass(frozen=True)
class Piece:
    """A file, or a span of it; `size` in bytes as stored."""

    path: str
    size: int
    span: tuple[int, int, int] | None = None

    def to_span(self) -> Span | None:
        """For `read_file`."""
        return None if self.span is None else Span(*self.span)


def plan_shards(files: Sequence[Path], shard_bytes: int) -> list[list[Piece]]:
    """Shards of about `shard_bytes`: small files together, large plain ones in spans, packed ones whole."""
    pieces: list[Piece] = []
    for path in files:
        size = path.stat().st_size
        plain = kind_of(path) == "jsonl" and path.suffix.lower() in (".jsonl", ".ndjson", ".json")
        if plain and size > shard_bytes:
            pieces += _cut(path, size, shard_bytes)
        else:
            pieces.append(Piece(str(path), size))
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.size
    return shards


def _cut(path: Path, size: int, shard_bytes: int) -> list[Piece]:
    """Spans at line ends, and the number of each one's first line: one pass over the file."""
    pieces, start, line, first = [], 0, 1, 1
    with open(path, "rb") as file:
        while start < size:
            left = min(shard_bytes, size - start)
            while left > 0:
                data = file.read(min(left, 1 << 22))
                line += data.count(b"\n")
                left -= len(data)
            while data and not data.endswith(b"\n"):
                data = file.readline(1 << 22)
                line += data.count(b"\n")
            end = file.tell()
            pieces.append(Piece(str(path), end - start, (start, end, first)))
            start, first = end, line
    return pieces


def fingerprint(path: Path) -> str:
    """Size and a hash of both ends of a file: tells a changed input without reading all of a large corpus."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(_EDGE_BYTES), digest_size=12)
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()}"


class Lines:
    """A gzipped JSON Lines file that appears under its name only when complete; the same records give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        # One name for every try: what a killed task leaves, the task that does it again takes up.
        self._aside = path.with_name(f".{path.name}.tmp")
        self._file = open(self._aside, "wb")
        self._packer = gzip.GzipFile("", "wb", 4, self._file, mtime=0)

    def __enter__(self) -> "Lines":
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        self._packer.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._packer.close()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._aside, self.path)
                fsync_dir(self.path.parent)
        finally:
            self._file.close()
            self._aside.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file that `Lines` wrote. Raises RunError for a damaged one."""
    for number, line, _ in lines_of(path):
        try:
            yield json.loads(line or b"")
        except ValueError:
            raise RunError(f"{path}:{number} is damaged; remove the folder's work/ and clean again") from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go when it ends, however it ends. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is cleaning into {out}; wait for it or choose another folder") from None
        yield
