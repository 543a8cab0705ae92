"""Lists of unwanted words and hosts, one a line, `#` for comments.

blocklist = Blocklist.read(["words.txt"], ["hosts.txt"])
blocklist.terms_in("some text")                     # the distinct terms in it, sorted
blocklist.blocked_host("https://a.bad.example/x")   # "bad.example", or None
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tnllm.errors import UserError


@dataclass(frozen=True)
class Blocklist:
    """Terms as one pattern, and host names."""

    pattern: re.Pattern[str] | None
    hosts: frozenset[str]

    @staticmethod
    def read(words: Iterable[str], hosts: Iterable[str]) -> "Blocklist":
        """Read the files. Raises UserError for one that is missing or not UTF-8."""
        terms = sorted({term.lower() for path in words for term in _entries(path)}, key=lambda term: (-len(term), term))
        # A Latin term must match a full word; Chinese does not separate words by spaces.
        parts = [rf"\b{re.escape(term)}\b" if term.isascii() else re.escape(term) for term in terms]
        names = frozenset(name.lower().removeprefix("www.") for path in hosts for name in _entries(path))
        return Blocklist(re.compile("|".join(parts)) if parts else None, names)

    def terms_in(self, text: str) -> list[str]:
        """The distinct terms in `text`, sorted."""
        return sorted(set(self.pattern.findall(text.lower()))) if self.pattern else []

    def blocked_host(self, url: object) -> str | None:
        """The entry that matches the URL's host or a domain above it; None if there is none."""
        if not self.hosts or not isinstance(url, str):
            return None
        try:
            parts = (urlsplit(url).hostname or "").lower().split(".")
        except ValueError:
            return None
        return next((name for start in range(len(parts)) if (name := ".".join(parts[start:])) in self.hosts), None)


def _entries(path: str) -> list[str]:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no blocklist {path}; name a file with one entry a line") from None
    except UnicodeDecodeError:
        raise UserError(f"blocklist {path} is not UTF-8 text") from None
    return [entry for line in lines if (entry := line.split("#")[0].strip())]
