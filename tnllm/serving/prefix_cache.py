"""Contexts of texts that were read before, found again by their tokens: a shared beginning is read once.

cache = PrefixCache(weights_hash(model), max_bytes=1 << 30)
context = cache.longest(prompt)             # after the longest beginning of the prompt that is there, or None
cache.put(prompt[:n], context)              # least recently used ones make room
n = cache.branch(prompt)                    # where the prompt leaves an earlier one: worth keeping

A recurrent state cannot be cut back to an earlier token, so a beginning is found only if its own state was kept.
`branch` says where: the second text with some beginning shows that it is shared, and the third finds it.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from tnllm.generation.context import Context

# Prompts remembered to see where later ones branch off, and how much of each.
_RECENT, _RECENT_TOKENS = 64, 1 << 16
# A shared beginning shorter than this is read again faster than it is copied.
MIN_TOKENS = 16


class PrefixCache:
    """Least recently used contexts, at most `max_bytes` of tensors. Not thread-safe: its engine's thread owns it."""

    def __init__(self, weights: str, max_bytes: int) -> None:
        """`weights` is `weights_hash(model)`: contexts of other weights are never found."""
        self._weights, self.max_bytes = weights, max_bytes
        self._entries: OrderedDict[tuple[int, bytes], Context] = OrderedDict()
        self._counts: dict[int, int] = {}  # entries of each length
        self._recent: deque[np.ndarray] = deque(maxlen=_RECENT)
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, prompt: Sequence[int]) -> Context | None:
        """The context after the longest kept beginning of `prompt`, the whole of it included."""
        lengths = sorted(length for length in self._counts if length <= len(prompt))
        for key in reversed(list(self._keys(prompt, lengths))):
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        return None

    def put(self, prefix: Sequence[int], context: Context) -> None:
        """Keep the context after `prefix`, if it fits at all and is long enough to be worth it."""
        size = _nbytes(context)
        if len(prefix) < MIN_TOKENS or size > self.max_bytes:
            return
        [key] = self._keys(prefix, [len(prefix)])
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        self._entries[key] = context
        self._counts[key[0]] = self._counts.get(key[0], 0) + 1
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            (length, _), oldest = self._entries.popitem(last=False)
            self.num_bytes -= _nbytes(oldest)
            self._counts[length] -= 1
            if not self._counts[length]:
                del self._counts[length]

    def branch(self, prompt: Sequence[int]) -> int:
        """How many tokens `prompt` shares with the earlier prompt most like it; it counts as an earlier one from now."""
        ids = np.array(prompt[:_RECENT_TOKENS], dtype=np.int64)
        shared = max((_common(ids, other) for other in self._recent), default=0)
        self._recent.append(ids)
        return shared if shared >= MIN_TOKENS else 0

    def _keys(self, prompt: Sequence[int], lengths: Iterable[int]) -> Iterable[tuple[int, bytes]]:
        """Keys of the beginnings of the given rising lengths, in one pass over the tokens."""
        data = np.array(prompt, dtype="<i8")
        digest = hashlib.sha256(self._weights.encode())
        for start, end in pairwise([0, *lengths]):
            digest.update(data[start:end].tobytes())
            yield end, digest.copy().digest()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.nonzero(a[:length] != b[:length])[0]
    return int(different[0]) if len(different) else length


def _nbytes(context: Context) -> int:
    return context.state.nbytes + context.logits.nbytes + context.seen.nbytes
