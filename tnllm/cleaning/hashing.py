"""Hashes of word and character n-grams, a document at a time in numpy; the same on every machine and in every run.

tokens = token_hashes("The quick brown fox")    # uint64 [words]; of Chinese, Japanese and Korean text [characters]
ngram_hashes(tokens, 5)                         # uint64 [n-grams], in order
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

from tnllm.data.permutation import splitmix64

_MULTIPLIER = 0x9E3779B97F4A7C15
_MAX_POWERS = 256
_BMP = 1 << 16
# What `kinds` says of a character, as bits. LETTER is a letter or digit, ALPHA a letter.
LETTER, ALPHA, SPACE, CJK = 1, 2, 4, 8


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


def _classify(codes: np.ndarray) -> np.ndarray:
    bits = [c.isalnum() * LETTER | c.isalpha() * ALPHA | c.isspace() * SPACE for c in map(chr, codes.tolist())]
    return np.array(bits, np.uint8) | is_cjk(codes) * np.uint8(CJK)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind, lower case and hash of each character below U+10000: looking up takes less time than working out."""
    codes = np.arange(_BMP, dtype=np.uint32)
    lower = np.array([ord(chr(code).lower()[0]) for code in codes.tolist()], np.uint32)
    return _classify(codes), lower, splitmix64(codes.astype(np.uint64))


def kinds(codes: np.ndarray) -> np.ndarray:
    """uint8 bits LETTER, ALPHA, SPACE and CJK of each code point."""
    table, _, _ = _tables()
    if codes.max(initial=0) < _BMP:
        return table[codes]
    result = table[np.minimum(codes, _BMP - 1)]
    rare = codes >= _BMP
    result[rare] = _classify(codes[rare])
    return result


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of True begins, and its length."""
    padded = np.zeros(len(mask) + 2, bool)
    padded[1:-1] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges[::2], edges[1::2] - edges[::2]


def _is_mostly_cjk(found: np.ndarray) -> bool:
    """Whether n-grams are of characters: more than 30 % of the letters are CJK."""
    letters = np.count_nonzero(found & LETTER)
    return bool(letters and np.count_nonzero((found & (LETTER | CJK)) == LETTER | CJK) / letters > 0.3)


# Decontamination and signing ask for the same text in turn.
@lru_cache(maxsize=1)
def token_hashes(text: str, characters: bool | None = None) -> tuple[np.ndarray, bool]:
    """A hash of each word, or if `characters` of each letter and digit, and `characters`; None decides by script.

    Upper and lower case are the same.
    """
    codes = codepoints(text)
    _, lower, _ = _tables()
    # Lower case of these is not that of each character by itself; the table has none beyond U+FFFF.
    if "İ" in text or "Σ" in text or codes.max(initial=0) >= _BMP:
        codes = codepoints(text.lower())
    else:
        codes = lower[codes]
    found = kinds(codes)
    if characters is None:
        characters = _is_mostly_cjk(found)
    letters = (found & LETTER).view(bool)
    hashes = character_hashes(codes[letters])
    return (hashes, True) if characters else (word_hashes(hashes, runs(letters)[1]), False)


def character_hashes(codes: np.ndarray) -> np.ndarray:
    """A hash of each code point, uint64."""
    _, _, table = _tables()
    return table[codes] if codes.max(initial=0) < _BMP else splitmix64(codes.astype(np.uint64))


def word_hashes(characters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A hash of each word, uint64 [words], of the hashes of its characters: one word after the other, `lengths` above 0."""
    if not len(lengths):
        return np.zeros(0, np.uint64)
    starts = np.cumsum(lengths) - lengths
    index = np.arange(len(characters)) - np.repeat(starts, lengths)
    return splitmix64(np.add.reduceat(characters * _POWERS[index & (_MAX_POWERS - 1)], starts))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of every `n` consecutive tokens, uint64 [len(tokens) - n + 1]; of fewer tokens, one hash of all."""
    if not len(tokens):
        return tokens
    n = min(n, len(tokens))
    # Sums of `length` tokens, doubled and lengthened by one along the binary digits of n.
    sums, length = tokens, 1
    for digit in f"{n:b}"[1:]:
        sums = sums[length:] * _POWERS[length % _MAX_POWERS] + sums[:-length]
        length *= 2
        if digit == "1":
            sums = tokens[length:] * _POWERS[length % _MAX_POWERS] + sums[: len(tokens) - length]
            length += 1
    return splitmix64(sums)


def content_hash(text: str) -> int:
    """64-bit hash of the text with case and white space normalised: equal hashes are exact duplicates."""
    return int.from_bytes(blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest(), "little")
