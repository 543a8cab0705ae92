"""The input of a cleaning run split into shards, the units of work and of resuming.

shards = plan_shards(find_files(["web/"]), shard_bytes=64 << 20)   # files, and spans of large plain ones
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tnllm.data.compressed import Span, open_stored, stored_size
from tnllm.data.corpus import JSON_LINES, kind_of
from tnllm.data.remote import RemoteFile

_EDGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Piece:
    """A file, or a span of it; `size` in bytes as stored. A remote file is fetched by the task that reads it."""

    file: Path | RemoteFile
    size: int
    span: Span | None = None


def plan_shards(files: Sequence[Path | RemoteFile], shard_bytes: int) -> list[list[Piece]]:
    """Shards of about `shard_bytes`: small files together, large plain ones in spans, compressed ones undivided."""
    pieces: list[Piece] = []
    for path in files:
        if isinstance(path, RemoteFile):
            pieces.append(Piece(path, path.size))
            continue
        size = stored_size(path)
        plain = kind_of(path) == "jsonl" and path.suffix.lower() in JSON_LINES
        if plain and size > shard_bytes:
            pieces += _cut(path, size, shard_bytes)
        else:
            pieces.append(Piece(path, size))
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
    """Spans at line ends with the number of their first line, found in one pass over the file."""
    pieces, start, line, first = [], 0, 1, 1
    with open_stored(path) as file:
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
            pieces.append(Piece(path, end - start, Span(start, end, first)))
            start, first = end, line
    return pieces


def fingerprint(path: Path | RemoteFile) -> str:
    """Size and a hash of both ends of a file: detects a changed input without reading all of a large corpus.

    Of a remote file, size and version.
    """
    if isinstance(path, RemoteFile):
        return f"{path.size}-{path.version}"
    size = stored_size(path)
    with open_stored(path) as file:
        digest = hashlib.blake2b(file.read(_EDGE_BYTES), digest_size=12)
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()}"
