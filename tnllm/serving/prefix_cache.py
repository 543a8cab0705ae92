"""Cached contexts by their tokens, so that a prefix shared by prompts is prefilled once.

cache = PrefixCache(weights_hash(model), max_bytes=1 << 30)
context = cache.longest(prompt)             # after the longest cached prefix of the prompt, or None
cache.put(prompt[:n], context)              # evicts the least recently used ones
n = cache.branch(prompt)                    # length of the prefix shared with an earlier prompt: worth caching

A recurrent state cannot be cut back to an earlier token, so a prefix is a hit only if its own state was cached.
`branch` says which: the second prompt with a prefix shows that it is shared, and the third hits it.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from tnllm.generation.context import Context

Ids = Sequence[int] | np.ndarray
# Earlier prompts that `branch` compares with, and how many tokens of each.
_RECENT, _RECENT_TOKENS = 64, 1 << 16
# A shorter prefix is prefilled again faster than its state is copied.
MIN_TOKENS = 16


class PrefixCache:
    """At most `max_bytes` of contexts, least recently used ones evicted. Not thread-safe: the engine's thread owns it."""

    def __init__(self, weights: str, max_bytes: int) -> None:
        """`weights` is `weights_hash(model)`: contexts of other weights are never a hit."""
        self._weights, self.max_bytes = weights, max_bytes
        self._entries: OrderedDict[tuple[int, bytes], Context] = OrderedDict()
        self._recent: deque[np.ndarray] = deque(maxlen=_RECENT)
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, prompt: Ids) -> Context | None:
        """The context after the longest cached prefix of `prompt`, which may be all of it; None if there is none."""
        lengths = sorted({length for length, _ in self._entries if length <= len(prompt)})
        for key in reversed(list(self._keys(prompt, lengths))):
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        return None

    def put(self, prefix: Ids, context: Context) -> None:
        """Cache the context after `prefix`, unless it is too large or the prefix too short."""
        size = context.nbytes
        if len(prefix) < MIN_TOKENS or size > self.max_bytes:
            return
        [key] = self._keys(prefix, [len(prefix)])
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        self._entries[key] = context
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].nbytes

    def branch(self, prompt: Ids) -> int:
        """Longest prefix, in tokens, that `prompt` shares with an earlier prompt, of which it is one from now on."""
        ids = np.array(prompt[:_RECENT_TOKENS], dtype=np.int64)
        shared = max((_common(ids, other) for other in self._recent), default=0)
        self._recent.append(ids)
        return shared if shared >= MIN_TOKENS else 0

    def _keys(self, prompt: Ids, lengths: Iterable[int]) -> Iterable[tuple[int, bytes]]:
        """Keys of the prefixes of the given increasing lengths, in one pass over the tokens."""
        data = np.array(prompt, dtype="<i8")
        digest = hashlib.sha256(self._weights.encode())
        for start, end in pairwise([0, *lengths]):
            digest.update(data[start:end].tobytes())
            yield end, digest.copy().digest()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.nonzero(a[:length] != b[:length])[0]
    return int(different[0]) if len(different) else length
