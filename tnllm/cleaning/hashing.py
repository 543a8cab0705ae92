"""Hashes of word and character n-grams, whole documents at a time in numpy; the same on every machine and run.

tokens = token_hashes("The quick brown fox")    # uint64 [words]; of Chinese, Japanese and Korean text [characters]
ngram_hashes(tokens, 5)                         # uint64 [n-grams], in order
"""

import re
from hashlib import blake2b

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_MAX_POWERS = 256


def _powers(count: int) -> np.ndarray:
    powers = [1]
    for _ in range(count - 1):
        powers.append(powers[-1] * _MULTIPLIER % 2**64)
    return np.array(powers, np.uint64)


_POWERS = _powers(_MAX_POWERS)


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64 bits each (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def codepoints(text: str) -> np.ndarray:
    """uint32 code points of `text`."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def is_cjk(codes: np.ndarray) -> np.ndarray:
    """Which code points are Han, kana or hangul: scripts without spaces between words (hangul: by custom of n-grams)."""
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
    """Whether n-grams of this text are made of characters: more than three tenths of its letters are CJK."""
    codes = codepoints("".join(_WORD.findall(text)))
    return bool(len(codes)) and float(is_cjk(codes).mean()) > 0.3


def token_hashes(text: str, characters: bool | None = None) -> np.ndarray:
    """A hash of each word, or with `characters` of each letter and digit; None chooses by script. Case is ignored."""
    words = words_of(text)
    if characters is None:
        characters = counts_characters(text)
    if characters:
        return mix(codepoints("".join(words)).astype(np.uint64))
    return word_hashes(words)


def word_hashes(words: list[str]) -> np.ndarray:
    """A hash of each word, uint64; words hold no space."""
    if not words:
        return np.zeros(0, np.uint64)
    codes = codepoints(" ".join(words)).astype(np.uint64)
    space = codes == 32
    starts = np.flatnonzero(np.concatenate([[True], space[:-1]]))
    lengths = np.diff(np.append(starts, len(codes)))
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = mix(codes) * _POWERS[place % _MAX_POWERS]
    values[space] = 0
    return mix(np.add.reduceat(values, starts))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of every `n` tokens in a row, uint64 [len(tokens) - n + 1]; of fewer tokens, one hash of all."""
    if not len(tokens):
        return tokens
    n = min(n, len(tokens))
    total = np.zeros(len(tokens) - n + 1, np.uint64)
    for place in range(n):
        total += tokens[place : len(tokens) - n + 1 + place] * _POWERS[place % _MAX_POWERS]
    return mix(total)


def content_hash(text: str) -> int:
    """64 bits of the text with case and runs of white space made uniform: equal means an exact duplicate."""
    return int.from_bytes(blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest(), "little")
