import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnllm.cleaning.hashing import (
    content_hash,
    counts_characters,
    extended_sums,
    ngram_hashes,
    token_hashes,
    word_hashes,
    words_of,
)
from tnllm.data.permutation import splitmix64


def jaccard(a, b, n=2):
    left, right = (set(ngram_hashes(token_hashes(text), n).tolist()) for text in (a, b))
    return len(left & right) / len(left | right)


def test_words_and_characters():
    assert len(token_hashes("The quick, brown fox!")) == 4
    assert len(token_hashes("鲁镇的酒店，是。")) == 6
    assert counts_characters("这是 iPhone 手机的说明") and not counts_characters("The word 鲁 in English prose")
    assert len(token_hashes("one two three", characters=True)) == 11


def test_case_and_punctuation_do_not_count():
    assert jaccard("The quick brown fox", "the QUICK, brown... fox?") == 1


def test_jaccard_by_hand():
    # Of "a b c d" and "a b c e": two pairs of words in common, two not.
    assert jaccard("a b c d", "a b c e") == 2 / 4
    assert jaccard("甲乙丙丁", "甲乙丙戊") == 2 / 4


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 6))
def test_equal_hashes_are_equal_words(words, n):
    hashes = word_hashes(words)
    assert len(hashes) == len(words)
    assert len(set(hashes.tolist())) == len(set(words))
    grams = ngram_hashes(hashes, n)
    expected = {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
    assert len(set(grams.tolist())) == len(expected)


@pytest.mark.slow
@given(st.text())
def test_any_text(text):
    assert len(token_hashes(text, characters=False)) == len(words_of(text))
    content_hash(text.encode("utf-8", "replace").decode())


def test_hashes_never_change():
    """They are stored in files that other runs read."""
    assert [int(token_hashes(text)[0]) for text in ("word", "字")] == [9480805241173167587, 2516393113289205985]
    assert content_hash("A  b") == 2952434739088078779
    assert content_hash("A  b\n") == content_hash("a b")


def test_lengthened_n_grams_are_the_longer_n_grams():
    tokens = token_hashes("one two three four five six seven eight nine")
    starts = np.array([0, 2, 3])
    sums = np.zeros(3, np.uint64)
    for length, n in ((0, 2), (2, 3), (3, 5)):
        sums = extended_sums(tokens, starts, sums, length, n)
        assert (splitmix64(sums) == ngram_hashes(tokens, n)[starts]).all()
