"""Rule filters: figures of a text, and the range each must lie in. Words in English, characters in Chinese.

values = figures(text, "en")            # {"length": 812.0, "mean_word_length": 4.6, ...}
broken = check(values, DEFAULTS["en"])  # None, or ("dup_lines", 0.52, (None, 0.3))

Sources: Gopher (arXiv 2112.11446, tables A1 and section A.1), C4 (arXiv 1910.10683), FineWeb (arXiv 2406.17557). They
count words. Written Chinese does not separate words, so its figures count characters, its n-grams are longer, its stop
words are function characters (modern and classical), and its terminal marks are 。！？. The Chinese limits are our own.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from tnllm.cleaning.hashing import codepoints, extended_sums, is_cjk, word_hashes
from tnllm.cleaning.repair import NEVER_BROKEN
from tnllm.data.permutation import splitmix64

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
_MAX_STOP_CHARS = max(map(len, _STOP_EN))
_STOP_ZH = frozenset("的一是了不在有我他她这那个们来到就和也说之其以而于於為为者無无乃曰何此所則则矣兮人自上下中")
_BULLETS = ("•", "-", "*", "●", "■", "◆", "·", "▪", "※")
_END_MARKS = tuple(".!?\"'”’)]。！？」』）】…；;:：")
_LETTERS = re.compile(r"[^\W_]+")
_GARBLED = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯|锘|ï»¿|[\x00-\x08\x0b\x0c\x0e-\x1f]")


def figures(text: str, language: str) -> dict[str, float]:
    """Every figure of `text`; `language` "zh" counts characters, any other words. An empty text has only length 0."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return {"length": 0.0}
    chinese = language == "zh"
    values = _chinese(text) if chinese else _words(text)
    count, chars = max(values["length"], 1), len(text)
    values["symbols"] = (text.count("#") + text.count("...") + text.count("…")) / count
    values["bullet_lines"] = _share(lines, lambda line: line.startswith(_BULLETS))
    values["ellipsis_lines"] = _share(lines, lambda line: line.endswith(("...", "…")))
    values["end_marks"] = _share(lines, lambda line: line.endswith(_END_MARKS))
    values["short_lines"] = _share(lines, lambda line: len(line) <= (5 if chinese else 30))
    values["line_breaks"] = (len(lines) - 1) / count
    for name, parts in (("line", lines), ("paragraph", re.split(r"\n{2,}", text.strip()))):
        repeats = list((Counter(parts) - Counter(set(parts))).elements())
        values[f"dup_{name}s"] = len(repeats) / len(parts)
        values[f"dup_{name}_chars"] = sum(map(len, repeats)) / chars
    values["lorem_ipsum"] = text.lower().count("lorem ipsum")
    values["curly_brackets"] = (text.count("{") + text.count("}")) / count
    values["garbled"] = sum(len(match[0]) for match in _GARBLED.finditer(text)) / chars
    values["mojibake"] = _badness(text) / chars
    return values


def check(values: Mapping[str, float], limits: Mapping[str, Range]) -> tuple[str, float, Range] | None:
    """The first figure outside its range: its name, value and range."""
    for name, (low, high) in limits.items():
        value = values.get(name)
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            return name, value, (low, high)
    return None


def _words(text: str) -> dict[str, float]:
    words = text.split()
    counts = Counter(words)
    # Each distinct word is looked at once; most are letters only.
    plain = list(filter(str.isalpha, counts))
    rest = counts.keys() - set(plain)
    mixed = [word for word in rest if any(map(str.isalpha, word))]
    counted = [*plain, *mixed, *filter(_LETTERS.search, rest.difference(mixed))]
    times, sizes = list(map(counts.__getitem__, counted)), list(map(len, counted))
    number = sum(times)
    short = {word.lower() for word in plain if len(word) <= _MAX_STOP_CHARS}
    short |= {word.strip(".,;:!?\"'()[]").lower() for word in mixed}
    values = {
        "length": float(number),
        "mean_word_length": sum(map(operator.mul, times, sizes)) / max(number, 1),
        "longest_word": float(max(sizes, default=0)),
        "letters": sum(times[: len(plain) + len(mixed)]) / len(words),
        "stop_words": float(len(_STOP_EN & short)),
    }
    lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
    return values | _repetition(word_hashes(words), lengths, len(text), unit=1)


def _chinese(text: str) -> dict[str, float]:
    parts = _LETTERS.findall(text)
    stretches = list(map(len, parts))
    characters = "".join(text.split())
    codes = codepoints("".join(parts))
    values = {
        "length": float(sum(stretches)),
        "mean_word_length": sum(stretches) / max(len(stretches), 1),
        "longest_word": float(max(stretches, default=0)),
        "letters": sum(stretches) / len(characters),
        "stop_words": float(len(_STOP_ZH.intersection(text))),
        "han": float(is_cjk(codes).mean()) if len(codes) else 0.0,
    }
    return values | _repetition(splitmix64(codes.astype(np.uint64)), np.ones(len(codes), np.int64), len(text), unit=2)


def _repetition(tokens: np.ndarray, sizes: np.ndarray, chars: int, unit: int) -> dict[str, float]:
    """Gopher's n-gram figures; `unit` tokens count as one word.

    A repeated n-gram begins with a repeated shorter one, so each length is looked for only where the one before repeats.
    """
    values = {f"top_{words}gram": 0.0 for words in (2, 3, 4)} | {f"dup_{words}gram": 0.0 for words in (5, 7, 10)}
    ends = np.concatenate([[0], np.cumsum(sizes)])
    starts, sums, length = np.arange(len(tokens)), np.zeros(len(tokens), np.uint64), 0
    for words, name in zip((2, 3, 4, 5, 7, 10), values, strict=True):
        n = words * unit
        # As before, a text of exactly n tokens has no figure: its one n-gram cannot repeat.
        chosen = starts <= len(tokens) - n
        starts, sums = starts[chosen], extended_sums(tokens, starts[chosen], sums[chosen], length, n)
        length = n
        if len(starts) < 2:
            break
        hashes = splitmix64(sums)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        same = hashes[1:] == hashes[:-1]
        if not same.any():
            break
        # Of equal n-grams, which lie together now, the first in the text comes first.
        runs = np.flatnonzero(np.concatenate([[True], ~same]))
        counts = np.diff(np.append(runs, len(order)))
        first = order[runs]
        repeated = np.empty(len(order), bool)
        repeated[order] = np.repeat(counts > 1, counts)
        if words <= 4:
            best = int(counts.argmax())
            begin = starts[first[best]]
            values[name] = float(counts[best] * (ends[begin + n] - ends[begin]) / chars)
        else:
            again = repeated.copy()
            again[first] = False
            # A token counts once, even if it is in several repeated n-grams.
            edges = np.bincount(starts[again], minlength=len(tokens) + 1)
            edges -= np.bincount(starts[again] + n, minlength=len(tokens) + 1)
            values[name] = float(sizes[np.cumsum(edges[:-1]) > 0].sum() / chars)
        starts, sums = starts[repeated], sums[repeated]
    return values


def _share(lines: list[str], test: Callable[[str], bool]) -> float:
    return sum(map(test, lines)) / len(lines)


def _badness(text: str) -> int:
    from ftfy.badness import badness

    # ftfy counts a character at a time; most lines hold nothing that it counts.
    return sum(badness(line) for line in text.split("\n") if not NEVER_BROKEN.fullmatch(line))
