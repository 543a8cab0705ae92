"""What reading a corpus gives: documents, and records that could not be read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """One document: its text, where it starts (`file`, `line` counted from 1) and its other fields.

    `position` is how many bytes of the file, as stored, had been read when the document was complete.
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
    """A record that could not be read, and why; reading continues after it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
