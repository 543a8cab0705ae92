"""Lists of unwanted words and hosts, one a line, `#` for remarks.

found = Blocklist.read(["words.txt"], ["hosts.txt"])
found.terms_in("some text")                     # the different terms in it, sorted
found.blocked_host("https://a.bad.example/x")   # "bad.example", or None
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
        # A Latin term is a whole word; Chinese has no spaces to be whole between.
        parts = [rf"\b{re.escape(term)}\b" if term.isascii() else re.escape(term) for term in terms]
        names = frozenset(name.lower().removeprefix("www.") for path in hosts for name in _entries(path))
        return Blocklist(re.compile("|".join(parts)) if parts else None, names)

    def terms_in(self, text: str) -> list[str]:
        """Different terms found."""
        return sorted(set(self.pattern.findall(text.lower()))) if self.pattern else []

    def blocked_host(self, url: object) -> str | None:
        """The entry that the URL's host, or a domain above it, is on."""
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
