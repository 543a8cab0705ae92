"""Hashes of word and character n-grams, a document at a time in numpy; the same on every machine and in every run.

tokens = token_hashes("The quick brown fox")    # uint64 [words]; of Chinese, Japanese and Korean text [characters]
ngram_hashes(tokens, 5)                         # uint64 [n-grams], in order
"""

import re
from hashlib import blake2b

import numpy as np

from tnllm.data.permutation import splitmix64

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_MAX_POWERS = 256


def _powers(count: int) -> np.ndarray:
    powers = [1]
    for _ in range(count - 1):
        powers.append(powers[-1] * _MULTIPLIER % 2**64)
    return np.array(powers, np.uint64)


_POWERS = _powers(_MAX_POWERS)


def codepoints(text: str) -> np.ndarray:
    """uint32 code points of `text`."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def is_cjk(codes: np.ndarray) -> np.ndarray:
    """Which code points are Han, kana or hangul: scripts whose n-grams are of characters."""
    return (
        ((codes >= 0x3400) & (codes <= 0x9FFF))
        | ((codes >= 0x3041) & (codes <= 0x30FF))
        | ((codes >= 0xAC00) & (codes <= 0xD7AF))
        | ((codes >= 0xF900) & (codes <= 0xFAFF))
        | ((codes >= 0x20000) & (codes <= 0x3FFFF))
    )


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def counts_characters(text: str) -> bool:
    """Whether n-grams of this text are of characters: more than 30 % of its letters are CJK."""
    if text.isascii():
        return False
    codes = codepoints("".join(_WORD.findall(text)))
    return bool(len(codes)) and float(is_cjk(codes).mean()) > 0.3


def token_hashes(text: str, characters: bool | None = None) -> np.ndarray:
    """A hash of each word, or with `characters` of each letter and digit; None decides by script. Case is ignored."""
    words = words_of(text)
    if characters is None:
        characters = counts_characters(text)
    if characters:
        return splitmix64(codepoints("".join(words)).astype(np.uint64))
    return word_hashes(words)


def word_hashes(words: list[str]) -> np.ndarray:
    """A hash of each word, uint64; words must not contain spaces."""
    if not words:
        return np.zeros(0, np.uint64)
    codes = codepoints(" ".join(words)).astype(np.uint64)
    space = codes == 32
    starts = np.flatnonzero(np.concatenate([[True], space[:-1]]))
    lengths = np.diff(np.append(starts, len(codes)))
    index = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = splitmix64(codes) * _POWERS[index % _MAX_POWERS]
    values[space] = 0
    return splitmix64(np.add.reduceat(values, starts))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of every `n` consecutive tokens, uint64 [len(tokens) - n + 1]; of fewer tokens, one hash of all."""
    if not len(tokens):
        return tokens
    n = min(n, len(tokens))
    total = np.zeros(len(tokens) - n + 1, np.uint64)
    for index in range(n):
        total += tokens[index : len(tokens) - n + 1 + index] * _POWERS[index % _MAX_POWERS]
    return splitmix64(total)


def extended_sums(tokens: np.ndarray, starts: np.ndarray, sums: np.ndarray, length: int, n: int) -> np.ndarray:
    """Lengthen the n-grams that begin at `starts` from `length` tokens to `n`: the sums that `ngram_hashes` hashes.

    `sums` uint64 are those of `length` tokens (zeros for 0); splitmix64 of the result is the n-grams' hashes.
    """
    total = sums.copy()
    for index in range(length, n):
        total += tokens[starts + index] * _POWERS[index % _MAX_POWERS]
    return total


def content_hash(text: str) -> int:
    """64-bit hash of the text with case and white space normalised: equal hashes are exact duplicates."""
    return int.from_bytes(blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest(), "little")
