"""A model's answers on disk, so that a killed evaluation resumes.

    cache = AnswerCache(folder, {"weights": ..., "dtype": ...})     # a file for these weights
    key = cache.key("loglikelihood", (context, continuation))
    cache.get([key]); cache.put(key, (-1.5, True)); cache.close()

The file name is a hash of everything but the prompt that answers depend on: weights, tokenizer, dtype, shared prefixes. The
key is a hash of the complete prompt, so it covers shots, templates and wording.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnllm.errors import RunError

# A killed run loses at most this much work.
_COMMIT_EVERY_S = 2.0
# SQLite limits the number of parameters of a query.
_QUERY_KEYS = 500


class AnswerCache:
    """A SQLite file, which several processes of one machine can share."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open or create the file for `identity` in `folder`. Raises RunError if it cannot be written."""
        text = json.dumps(identity, sort_keys=True)
        self.path = Path(folder) / f"answers-{hashlib.sha256(text.encode()).hexdigest()[:16]}.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)")
            self._database.execute("CREATE TABLE IF NOT EXISTS identity (text TEXT PRIMARY KEY)")
            self._database.execute("INSERT OR IGNORE INTO identity VALUES (?)", (text,))
            self._database.commit()
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"cannot use the cache {self.path} ({error}); give another --cache-dir") from None
        self._committed = time.monotonic()

    @staticmethod
    def key(kind: str, arguments: Sequence[Any]) -> str:
        return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        answers = {}
        for start in range(0, len(keys), _QUERY_KEYS):
            part = list(keys[start : start + _QUERY_KEYS])
            query = f"SELECT key, value FROM answers WHERE key IN ({','.join('?' * len(part))})"
            answers.update({key: json.loads(value) for key, value in self._database.execute(query, part)})
        return answers

    def put(self, key: str, value: Any) -> None:
        """Store an answer; it reaches the disk within seconds."""
        try:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
            if time.monotonic() - self._committed > _COMMIT_EVERY_S:
                self.flush()
        except sqlite3.Error as error:
            raise RunError(f"cannot write the cache {self.path} ({error}); is the disk full?") from None

    def flush(self) -> None:
        self._database.commit()
        self._committed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._database.close()
