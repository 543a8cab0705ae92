"""Rule filters: figures of a text, and the range each must lie in. Words in English, characters in Chinese.

values = figures(text, "en")            # {"length": 812.0, "mean_word_length": 4.6, ...}
broken = check(values, DEFAULTS["en"])  # None, or ("dup_lines", 0.52, (None, 0.3))

Sources: Gopher (arXiv 2112.11446, tables A1 and section A.1), C4 (arXiv 1910.10683), FineWeb (arXiv 2406.17557). They
count words. Written Chinese does not separate words, so its figures count characters, its n-grams are longer, its stop
words are function characters (modern and classical), and its terminal marks are 。！？. The Chinese limits are our own.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from tnllm.cleaning.hashing import (
    ALPHA,
    LETTER,
    SPACE,
    character_hashes,
    codepoints,
    kinds,
    ngram_hashes,
    runs,
    word_hashes,
)
from tnllm.cleaning.repair import NEVER_BROKEN

Range = tuple[float | None, float | None]

# Figure → what it is. A recipe may set the range of any.
FIGURES = {
    "length": "words (en) or letters (zh)",
    "mean_word_length": "letters in a word; zh: letters between two punctuation marks",
    "longest_word": "letters of the longest word; zh: letters of the longest stretch without a mark",
    "letters": "share of words with a letter; zh: share of characters that are letters",
    "stop_words": "distinct ones among the most common function words or characters",
    "symbols": "hashes and ellipses for each word or letter",
    "bullet_lines": "share of lines that begin with a bullet",
    "ellipsis_lines": "share of lines that end with an ellipsis",
    "end_marks": "share of lines that end with a terminal mark",
    "short_lines": "share of lines of at most 30 characters; zh: 5",
    "line_breaks": "lines for each word or letter",
    "dup_lines": "share of lines seen before",
    "dup_line_chars": "share of characters in lines seen before",
    "dup_paragraphs": "share of paragraphs seen before",
    "dup_paragraph_chars": "share of characters in paragraphs seen before",
    "top_2gram": "share of characters in the most common 2 words (zh: 4 letters) in a row",
    "top_3gram": "3 words; zh: 6 letters",
    "top_4gram": "4 words; zh: 8 letters",
    "dup_5gram": "share of characters in 5 words (zh: 10 letters) in a row seen before",
    "dup_7gram": "7 words; zh: 14 letters",
    "dup_10gram": "10 words; zh: 20 letters",
    "lorem_ipsum": "occurrences of the filler text",
    "curly_brackets": "curly brackets for each word or letter: code in a page",
    "garbled": "share of replacement characters and known remains of broken encodings",
    "mojibake": "character pairs that occur only in mis-decoded text (ftfy), for each character",
}
_COMMON: dict[str, Range] = {
    "symbols": (None, 0.1),
    "bullet_lines": (None, 0.9),
    "ellipsis_lines": (None, 0.3),
    "end_marks": (0.12, None),
    "dup_lines": (None, 0.3),
    "dup_line_chars": (None, 0.2),
    "dup_paragraphs": (None, 0.3),
    "dup_paragraph_chars": (None, 0.2),
    "top_2gram": (None, 0.2),
    "top_3gram": (None, 0.18),
    "top_4gram": (None, 0.16),
    "dup_5gram": (None, 0.15),
    "dup_7gram": (None, 0.13),
    "dup_10gram": (None, 0.1),
    "lorem_ipsum": (None, 0),
    "curly_brackets": (None, 0.02),
    "garbled": (None, 0.0005),
    "mojibake": (None, 0.01),
}
DEFAULTS: dict[str, dict[str, Range]] = {
    "en": _COMMON
    | {
        "length": (50, 100_000),
        "mean_word_length": (3, 10),
        "longest_word": (None, 1000),
        "letters": (0.8, None),
        "stop_words": (2, None),
        "short_lines": (None, 0.67),
        "line_breaks": (None, 0.3),
    },
    "zh": _COMMON
    | {
        "length": (50, 200_000),
        "mean_word_length": (2, 40),
        "longest_word": (None, 300),
        "letters": (0.7, None),
        "stop_words": (3, None),
        "short_lines": (None, 0.67),
        "line_breaks": (None, 0.2),
    },
    # Other languages: limits that hold for any text.
    "other": {name: limits for name, limits in _COMMON.items() if name not in ("end_marks", "curly_brackets")},
}
_STOP_EN = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_STOP_ZH = frozenset("的一是了不在有我他她这那个们来到就和也说之其以而于於為为者無无乃曰何此所則则矣兮人自上下中")
_BULLETS = frozenset("•-*●■◆·▪※")
_END_MARKS = frozenset(".!?\"'”’)]。！？」』）】…；;:：")
_GARBLED = ("\ufffd", "锟斤拷", "烫烫烫", "屯屯屯", "锘", "ï»¿")
# Words looked at together for stop words: most English texts have all of them among the first.
_SOME_WORDS = 400
# Words in an n-gram; of at most so many, the most common one counts.
_NGRAMS = {2: "top_2gram", 3: "top_3gram", 4: "top_4gram", 5: "dup_5gram", 7: "dup_7gram", 10: "dup_10gram"}
_MOST_COMMON_WORDS = 4
_FEW_TOKENS = 300
# Characters of the longest sequence that ftfy calls broken, but for one.
_BROKEN_REACH = 6


def figures(text: str, language: str) -> dict[str, float]:
    """Every figure of `text`; `language` "zh" counts characters, any other words. An empty text has only length 0."""
    lines = list(filter(None, map(str.strip, text.split("\n"))))
    if not lines:
        return {"length": 0.0}
    chinese = language == "zh"
    codes = codepoints(text)
    values = (_chinese if chinese else _words)(text, codes, kinds(codes))
    count, chars = max(values["length"], 1), len(text)
    ellipses, short = text.count("...") + text.count("…"), 5 if chinese else 30
    values["symbols"] = (text.count("#") + ellipses) / count
    values["bullet_lines"] = len([line for line in lines if line[0] in _BULLETS]) / len(lines)
    ends = [line for line in lines if line.endswith(("...", "…"))] if ellipses else []
    values["ellipsis_lines"] = len(ends) / len(lines)
    values["end_marks"] = len([line for line in lines if line[-1] in _END_MARKS]) / len(lines)
    values["short_lines"] = len([line for line in lines if len(line) <= short]) / len(lines)
    values["line_breaks"] = (len(lines) - 1) / count
    paragraphs = [part for part in (part.lstrip("\n") for part in text.strip().split("\n\n")) if part]
    for name, parts in (("line", lines), ("paragraph", paragraphs)):
        # Most texts have no repeated lines, which a set says sooner.
        distinct = set(parts)
        repeats = list((Counter(parts) - Counter(distinct)).elements()) if len(distinct) < len(parts) else []
        values[f"dup_{name}s"] = len(repeats) / len(parts)
        values[f"dup_{name}_chars"] = sum(map(len, repeats)) / chars
    values["lorem_ipsum"] = text.lower().count("lorem ipsum")
    values["curly_brackets"] = (text.count("{") + text.count("}")) / count
    control = int(np.count_nonzero(codes < 32)) - sum(map(text.count, "\t\n\r"))
    remains = () if text.isascii() else _GARBLED
    values["garbled"] = (control + sum([text.count(part) * len(part) for part in remains])) / chars
    values["mojibake"] = _badness(text, codes) / chars if remains else 0.0
    return values


def check(values: Mapping[str, float], limits: Mapping[str, Range]) -> tuple[str, float, Range] | None:
    """The first figure outside its range: its name, value and range."""
    for name, (low, high) in limits.items():
        value = values.get(name)
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            return name, value, (low, high)
    return None


def _words(text: str, codes: np.ndarray, found: np.ndarray) -> dict[str, float]:
    spaces = (found & SPACE).view(bool)
    starts, sizes = runs(spaces == 0)
    # Of each word, whether it has a letter or digit (it counts), and a letter.
    has = np.bitwise_or.reduceat(found, starts)
    counted = sizes[(has & (LETTER | ALPHA)) != 0]
    values = {
        "length": float(len(counted)),
        "mean_word_length": int(counted.sum()) / max(len(counted), 1),
        "longest_word": float(counted.max(initial=0)),
        "letters": float(np.count_nonzero(has & ALPHA) / len(sizes)),
        "stop_words": float(_stop_words(text)),
    }
    hashes = word_hashes(character_hashes(codes[spaces == 0]), sizes)
    return values | _repetition(hashes, np.append(0, np.cumsum(sizes + 1)), len(text), unit=1)


def _stop_words(text: str) -> int:
    """How many of the English stop words occur."""
    seen: set[str] = set()
    size = _SOME_WORDS
    while text and len(seen) < len(_STOP_EN):
        words = text.split(None, size)
        text = words.pop() if len(words) > size else ""
        seen |= _STOP_EN.intersection(words)
        if len(seen) < len(_STOP_EN):
            seen |= _STOP_EN.intersection(word.strip(".,;:!?\"'()[]").lower() for word in set(words))
        # Each time more, since what is left is copied each time.
        size *= 2
    return len(seen)


def _chinese(text: str, codes: np.ndarray, found: np.ndarray) -> dict[str, float]:
    letters = (found & LETTER).view(bool)
    _, stretches = runs(letters)
    count = int(stretches.sum())
    values = {
        "length": float(count),
        "mean_word_length": count / max(len(stretches), 1),
        "longest_word": float(stretches.max(initial=0)),
        "letters": float(count / (len(found) - np.count_nonzero(found & SPACE))),
        "stop_words": float(sum(map(text.__contains__, _STOP_ZH))),
    }
    return values | _repetition(character_hashes(codes[letters]), np.arange(count + 1), len(text), unit=2)


def _repetition(tokens: np.ndarray, ends: np.ndarray, chars: int, unit: int) -> dict[str, float]:
    """Gopher's n-gram figures; `unit` tokens count as one word, and `ends` are 0 and the characters up to each one's end.

    A repeated n-gram begins and ends with repeated shorter ones, so each length is looked for only where the one before
    repeats, and is known by the numbers of those two.
    """
    values = dict.fromkeys(_NGRAMS.values(), 0.0)
    if len(tokens) <= 2 * unit:
        return values
    count = _repeats_of_few if len(tokens) <= _FEW_TOKENS else _repeats
    for name, repeated in zip(values, count(tokens, ends, unit), strict=False):
        values[name] = float(repeated / chars)
    return values


def _repeats(tokens: np.ndarray, ends: np.ndarray, unit: int) -> Iterator[int]:
    """Characters in the most common n-gram, or in repeated ones, of each length in turn until none repeats."""
    n, bits = 2 * unit, len(tokens).bit_length()
    # Less the bits that a position takes below.
    keys, starts = (ngram_hashes(tokens, n) >> np.uint64(bits + 1)).view(np.int64), np.arange(len(tokens) - n + 1)
    # The number of the repeated n-gram at each position.
    numbers = np.full(len(tokens) + 1, -1)
    for words in _NGRAMS:
        if words > 2:
            step, n = words * unit - n, words * unit
            first, second = numbers[starts], numbers[starts + step]
            numbers[starts] = -1
            both = second >= 0
            keys, starts = first[both] * len(tokens) + second[both], starts[both]
        if keys.max(initial=0) >> (63 - bits):
            order = np.argsort(keys, kind="stable")
            keys, starts = keys[order], starts[order]
        else:
            # Sorting numbers takes a fraction of the time of finding their order.
            packed = np.sort(keys << bits | starts)
            keys, starts = packed >> bits, packed & ((1 << bits) - 1)
        again = np.zeros(len(keys), bool)
        again[1:] = keys[1:] == keys[:-1]
        if not again.any():
            return
        repeated = again.copy()
        repeated[:-1] |= again[1:]
        # Grouped by n-gram, of each the first in the text first.
        again, starts = again[repeated], starts[repeated]
        group = np.cumsum(~again) - 1
        if words <= _MOST_COMMON_WORDS:
            counts = np.bincount(group)
            most = counts.max()
            yield most * _span(tokens, ends, starts[~again][counts == most], n)
        else:
            # A token counts once, even if it is in several repeated n-grams.
            begin = np.sort(starts[again])
            end = np.minimum(begin + n, np.append(begin[1:], len(tokens)))
            yield (ends[end] - ends[begin]).sum()
        numbers[starts] = group
        starts = np.sort(starts)


def _repeats_of_few(tokens: np.ndarray, ends: np.ndarray, unit: int) -> Iterator[int]:
    """As `_repeats`; without arrays, whose fixed cost is most of the time that a short text takes."""
    n, ends_of = 2 * unit, ends.tolist()
    keys: list[Any] = ngram_hashes(tokens, n).tolist()
    starts: Iterable[int] = range(len(keys))
    numbers: dict[int, int] = {}
    for words in _NGRAMS:
        if words > 2:
            step, n = words * unit - n, words * unit
            starts = [at for at in numbers if at + step in numbers]
            keys = [(numbers[at], numbers[at + step]) for at in starts]
        if len(set(keys)) == len(keys):
            return
        counts = Counter(keys)
        # A repeated n-gram is known by where it is first.
        first: dict[Any, int] = {}
        numbers = {at: first.setdefault(key, at) for at, key in zip(starts, keys, strict=True) if counts[key] > 1}
        if words <= _MOST_COMMON_WORDS:
            most = max(counts.values())
            best = [at for key, at in first.items() if counts[key] == most]
            spans = {ends_of[at + n] - ends_of[at] for at in best}
            yield most * (spans.pop() if len(spans) == 1 else _span(tokens, ends, np.array(best), n))
        else:
            covered = end = 0
            for at, number in numbers.items():
                if at != number:
                    covered += ends_of[at + n] - ends_of[max(at, end)]
                    end = at + n
            yield covered


def _span(tokens: np.ndarray, ends: np.ndarray, starts: np.ndarray, n: int) -> int:
    """Characters of the n-gram at `starts`; if those differ, of the one with the lowest hash."""
    spans = ends[starts + n] - ends[starts]
    if spans.min() == spans.max():
        return int(spans[0])
    return int(spans[ngram_hashes(tokens[starts + np.arange(n)[:, None]], n)[0].argmin()])


@lru_cache(maxsize=1)
def _suspects() -> np.ndarray:
    """Which characters below U+10000 ftfy may count; the last stands for all above."""
    return np.array([not NEVER_BROKEN.fullmatch(chr(code)) for code in range(1 << 16)])


def _badness(text: str, codes: np.ndarray) -> int:
    """Sequences that occur only in mis-decoded text: ftfy's count of each line, which looks at every character.

    Every such sequence holds a suspect character, so only what is near one is given to it.
    """
    if NEVER_BROKEN.fullmatch(text):
        return 0
    from ftfy.badness import badness

    near = np.flatnonzero(_suspects()[np.minimum(codes, (1 << 16) - 1)])
    gaps = np.flatnonzero(np.diff(near) > 2 * _BROKEN_REACH)
    begins = np.maximum(near[np.append(0, gaps + 1)] - _BROKEN_REACH, 0)
    ends = near[np.append(gaps, len(near) - 1)] + _BROKEN_REACH + 1
    parts = [text[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    return sum(badness(line) for part in parts for line in part.split("\n"))
