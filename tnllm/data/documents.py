"""What reading a corpus gives: documents, and records that could not be read.

left_out = LeftOut()
texts = [document.text for document in read_documents(files, on_bad=left_out)]
left_out.count                  # the first ten were named on stderr
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnllm.data.folders import shown
from tnllm.errors import RunError
from tnllm.progress import log

_MAX_NAMED = 10


class UnreadableFile(RunError):
    """A file, or what is left of it, cannot be read; its message begins with the path. Other files still can."""


@dataclass(frozen=True)
class Document:
    """One document: its text, where it starts (`file`, `line` counted from 1) and its other fields.

    `position` is how many bytes of the file, as stored, had been read when the document was complete. `lost` names the
    fields whose values could not be kept, and why. `url`: where a file came from that was fetched.
    """

    text: str
    file: Path
    line: int
    position: int
    record: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    url: str = ""

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.url or self.file}:{self.line}"


@dataclass(frozen=True)
class BadDocument:
    """A record that could not be read, and why; reading continues after it.

    `is_damage`: the file itself is broken here, and more than one record may be lost.
    """

    where: str
    reason: str
    is_damage: bool = False

    def __str__(self) -> str:
        return self.reason if self.reason.startswith(self.where) else f"{self.where}: {self.reason}"


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


class LeftOut:
    """Counts what could not be read and names the first ten on stderr; `count` says how many there were before."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __call__(self, bad: BadDocument) -> None:
        self.count += 1
        if self.count <= _MAX_NAMED:
            log(f"left out: {shown(bad)}")
        if self.count == _MAX_NAMED:
            log("further ones are counted, not shown")
