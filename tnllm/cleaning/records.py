"""The files of a cleaning run: gzipped JSON Lines, one record a document, written completely or not at all.

with RecordWriter(folder / "00000.jsonl.gz") as writer:      # renamed to its name when the block ends without an error
    writer.write({"text": "..."})
for record in read_records(folder / "00000.jsonl.gz"): ...
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tnllm.data.compressed import read_lines
from tnllm.data.documents import Document
from tnllm.errors import RunError
from tnllm.files import fsync_dir

# The field of a rejected record that holds step, reason and figures.
REJECTED = "rejected"


def named_fields(document: Document, id_field: str, source_field: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """A document's name, its other fields with `source` and `where`, and the fields that cannot be kept, with why.

    A record has names of its own for what cleaning says of a document: a field of such a name, unless it is what that name
    stands for, is lost. An earlier run's `where` and `rejected` are replaced.
    """
    fields, lost = dict(document.record), dict(document.lost)
    name = str(fields.pop(id_field, document.where))
    source = str(fields.pop(source_field, Path(document.url or document.file).name.split(".")[0]))
    fields.pop(REJECTED, None)
    for key in ("text", "id", "source"):
        if key in fields:
            del fields[key]
            lost[key] = f"the result has another field {key!r}"
    return name, fields | {"source": source, "where": document.where}, lost


class RecordWriter:
    """Writes one file; the same records give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is fixed, so a task that runs again overwrites what its killed predecessor left.
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")
        self._gzip = gzip.GzipFile("", "wb", 4, self._file, mtime=0)

    def __enter__(self) -> "RecordWriter":
        return self

    def write(self, record: dict[str, Any]) -> None:
        self._gzip.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._gzip.close()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._temporary, self.path)
                fsync_dir(self.path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file that `RecordWriter` wrote. Raises RunError for a damaged one."""
    for number, line, _ in read_lines(path):
        try:
            yield json.loads(line or b"")
        except ValueError:
            raise RunError(f"{path}:{number} is damaged; remove the folder's work/ and clean again") from None


def read_folder(folder: Path, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Records of a folder's files whose names begin with `prefix`, sorted by name."""
    for path in sorted(folder.glob(f"{prefix}*.jsonl.gz")):
        yield from read_records(path)
