import re

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tnllm.cleaning.hashing import (
    character_hashes,
    codepoints,
    content_hash,
    is_cjk,
    ngram_hashes,
    token_hashes,
    word_hashes,
)
from tnllm.data.permutation import splitmix64


def jaccard(a, b, n=2):
    left, right = (set(ngram_hashes(token_hashes(text)[0], n).tolist()) for text in (a, b))
    return len(left & right) / len(left | right)


def test_words_and_characters():
    assert len(token_hashes("The quick, brown fox!")[0]) == 4
    assert len(token_hashes("鲁镇的酒店，是。")[0]) == 6
    assert token_hashes("这是 iPhone 手机的说明")[1] and not token_hashes("The word 鲁 in English prose")[1]
    assert len(token_hashes("one two three", characters=True)[0]) == 11


def test_case_and_punctuation_do_not_count():
    assert jaccard("The quick brown fox", "the QUICK, brown... fox?") == 1


def test_jaccard_by_hand():
    # Of "a b c d" and "a b c e": two pairs of words in common, two not.
    assert jaccard("a b c d", "a b c e") == 2 / 4
    assert jaccard("甲乙丙丁", "甲乙丙戊") == 2 / 4


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 6))
def test_equal_hashes_are_equal_words(words, n):
    hashes = word_hashes(character_hashes(codepoints("".join(words))), np.array(list(map(len, words))))
    assert len(hashes) == len(words)
    assert len(set(hashes.tolist())) == len(set(words))
    grams = ngram_hashes(hashes, n)
    expected = {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
    assert len(set(grams.tolist())) == len(expected)


MULTIPLIER = 0x9E3779B97F4A7C15


def hash_of(word):
    """The definition, a character at a time."""
    return splitmix64(sum(splitmix64(ord(c)) * MULTIPLIER ** (i % 256) for i, c in enumerate(word)) % 2**64)


@given(st.text() | st.text("aZ_ 9.İıΣσςǅſK鲁あ한\U00010400\U00020000\U0001f600\xa0\u3000\n"))
@example("a" * 300 + " İΣ. ΑΣ 鲁")
@settings(max_examples=300)
def test_tokens_of_any_text_are_the_hashes_of_its_words(text):
    """The tables by character give what Python's own idea of a word and of lower case gives."""
    words = re.findall(r"[^\W_]+", text.lower())
    assert token_hashes(text, False)[0].tolist() == list(map(hash_of, words))
    assert token_hashes(text, True)[0].tolist() == [splitmix64(ord(c)) for c in "".join(words)]
    letters = "".join(re.findall(r"[^\W_]+", text))
    expected = bool(letters) and is_cjk(codepoints(letters)).mean() > 0.3
    assert token_hashes(text)[1] == expected
    content_hash(text.encode("utf-8", "replace").decode())


def test_hashes_never_change():
    """They are stored in files that other runs read."""
    assert [int(token_hashes(text)[0][0]) for text in ("word", "字")] == [9480805241173167587, 2516393113289205985]
    assert content_hash("A  b") == 2952434739088078779
    assert content_hash("A  b\n") == content_hash("a b")


@given(st.text("ab", min_size=1, max_size=40), st.integers(1, 45))
def test_sums_by_doubling_are_sums_of_every_token(letters, n):
    tokens, _ = token_hashes(" ".join(letters))
    n = min(n, len(tokens))
    powers = np.array([MULTIPLIER**index % 2**64 for index in range(n)], np.uint64)
    expected = [(tokens[start : start + n] * powers).sum() for start in range(len(tokens) - n + 1)]
    assert ngram_hashes(tokens, n).tolist() == splitmix64(np.array(expected, np.uint64)).tolist()
