import random

import pytest
from ftfy.badness import badness
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cleaning import noise
from tests.cleaning.texts import CHINESE, CLASSICAL, ENGLISH
from tnllm.cleaning import rules
from tnllm.cleaning.rules import DEFAULTS, FIGURES, check, figures


@pytest.mark.parametrize(("text", "language"), [(ENGLISH, "en"), (CHINESE, "zh"), (CLASSICAL, "zh")])
def test_good_text_passes(text, language):
    assert check(figures(text, language), DEFAULTS[language]) is None


def paragraphs(language):
    text = ENGLISH if language == "en" else CHINESE
    return text.replace("\n", " " if language == "en" else "")


LINE = {"en": "The president of the senate spoke to them with love.", "zh": "鲁镇的酒店的格局是和别处不同的。"}
# Figure → text in each language that breaks it.
BROKEN = {
    "length": ("Only a few words, that is all there is to it.", "只有几个字而已，这就是全部。"),
    "mean_word_length": ("a b of it is to do " * 20, "的。一。是。了。我。不。" * 12),
    "longest_word": (ENGLISH + " " + "x" * 1001, CHINESE + "的" * 301),
    "letters": (ENGLISH + " 12 34 | + = 56" * 20, CHINESE + "＋－×÷＝" * 60),
    "stop_words": (
        "Lorenzo walked slowly through empty rooms, looking for somebody else. " * 8,
        "".join(chr(0x4E10 + 37 * i) for i in range(120)) + "。",
    ),
    "symbols": (ENGLISH.replace(" ", " # ", 40), CHINESE + "#" * 60),
    "bullet_lines": (
        "\n".join(f"- the {w} and that is to be" for w in ENGLISH.split()[:30]),
        "\n".join(f"· 这是{c}的一个说法" for c in CHINESE[:30]),
    ),
    "ellipsis_lines": (
        "\n".join(f"the {w} and that is to be..." for w in ENGLISH.split()[:20]),
        "\n".join(f"这是{c}的一个说法…" for c in CHINESE[:20]),
    ),
    "end_marks": (
        "\n".join(f"the {w} and that is to be told" for w in ENGLISH.split()[:20]),
        "\n".join(f"这是{c}的一个说法" for c in CHINESE[:20]),
    ),
    "short_lines": (
        "\n".join(f"and {w} to be the." for w in ENGLISH.split()[:60]),
        "\n".join(f"这是{c}的。" for c in CHINESE[:60]),
    ),
    "line_breaks": (
        "\n".join(f"{w} the." for w in ENGLISH.split()[:60]),
        "\n".join(f"是{c}的。" for c in CHINESE[:60]),
    ),
    "dup_lines": ("\n".join([LINE["en"]] * 20), "\n".join([LINE["zh"]] * 20)),
    "dup_line_chars": (
        f"{ENGLISH}\n{paragraphs('en')}\n{paragraphs('en')}",
        f"{CHINESE}\n{paragraphs('zh')}\n{paragraphs('zh')}",
    ),
    "dup_paragraphs": ("\n\n".join([LINE["en"]] * 9), "\n\n".join([LINE["zh"]] * 9)),
    "dup_paragraph_chars": ("\n\n".join([paragraphs("en")] * 3), "\n\n".join([paragraphs("zh")] * 3)),
    "top_2gram": ("of the " * 60, "的是一了" * 60),
    "top_3gram": ("to be the " * 60, "的是一了不在" * 60),
    "top_4gram": ("to be the of " * 60, "的是一了不在有我" * 60),
    "dup_5gram": (ENGLISH + " " + LINE["en"] * 9, CHINESE + LINE["zh"] * 9),
    "dup_7gram": (ENGLISH + " " + LINE["en"] * 9, CHINESE + LINE["zh"] * 9),
    "dup_10gram": (ENGLISH + " " + LINE["en"] * 9, CHINESE + LINE["zh"] * 9),
    "lorem_ipsum": (ENGLISH + " Lorem ipsum dolor sit amet.", CHINESE + "lorem ipsum。"),
    "curly_brackets": (ENGLISH + " if (x) { y(); } else { z(); }", CHINESE + "{}{}{}"),
    "garbled": (ENGLISH + " \ufffd\ufffd\ufffd", CHINESE + "锟斤拷"),
    "mojibake": (ENGLISH[:300] + "Ã©Ã¨Ã¤Ã¶â€™Ã¼", CHINESE + "Ã©Ã¨Ã¤Ã¶Ã¼"),
}


def test_every_figure_has_an_example():
    assert set(BROKEN) == set(FIGURES) == set(DEFAULTS["en"]) == set(DEFAULTS["zh"])


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_catches_its_example(name, language):
    found = figures(BROKEN[name][language == "zh"], language)
    broken = check(found, {name: DEFAULTS[language][name]})
    assert broken is not None and broken[0] == name and broken[1] == found[name]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
@pytest.mark.parametrize("kind", ["boilerplate page", "keywords", "repetition", "fragment", "lost encoding"])
def test_kinds_of_dirt_are_caught(kind, text):
    language = "en" if text is ENGLISH else "zh"
    assert check(figures(noise._MAKERS[kind](text, random.Random(1)), language), DEFAULTS[language]) is not None


def test_figures_by_hand():
    found = figures("The cat and the dog.\n\nThe cat and the dog.", "en")
    assert found["length"] == 10
    assert found["dup_lines"] == 0.5 and found["dup_line_chars"] == 20 / 42
    assert found["mean_word_length"] == pytest.approx((3 + 3 + 3 + 3 + 4) / 5)
    assert found["stop_words"] == 2
    # "the dog." and the spaces behind its words: 9 characters, twice, of 42.
    assert found["top_2gram"] == pytest.approx(18 / 42)


def test_n_grams_count_a_repeated_letter_once():
    found = figures("甲乙丙丁戊己庚辛壬癸子" * 2, "zh")
    assert found["dup_5gram"] == pytest.approx(11 / 22, abs=0.01)


@given(st.text("ab", max_size=60), st.sampled_from(["en", "zh"]))
def test_repetition_is_what_counting_every_n_gram_gives(letters, language):
    """One-letter words, so that all n-grams are of one length and ties do not matter."""
    unit = 1 if language == "en" else 2
    text = " ".join(letters) if language == "en" else letters.replace("a", "甲").replace("b", "乙")
    found = figures(text, language)
    size, chars = (2 if language == "en" else 1), len(text)
    for words in (2, 3, 4, 5, 7, 10) if text else ():
        n = words * unit
        grams = [letters[start : start + n] for start in range(len(letters) - n + 1)]
        if words <= 4:
            most = max(map(grams.count, grams), default=0)
            expected = most * n * size / chars if most > 1 else 0
            name = f"top_{words}gram"
        else:
            again = {start + i for start, gram in enumerate(grams) if gram in grams[:start] for i in range(n)}
            expected, name = len(again) * size / chars, f"dup_{words}gram"
        assert found[name] == pytest.approx(expected), name


@given(st.lists(st.text("ab", min_size=1, max_size=2), min_size=5, max_size=80), st.sampled_from(["en", "zh"]))
def test_short_and_long_texts_have_the_same_repetition(words, language):
    """Of words of several lengths, so that ties between n-grams count."""
    text = (" " if language == "en" else "").join(words)
    with pytest.MonkeyPatch.context() as patch:
        results = [figures(text, language)]
        for number in (0, 10**6):
            patch.setattr(rules, "_FEW_TOKENS", number)
            results.append(figures(text, language))
    assert results[0] == results[1] == results[2]


@given(st.text("ab é€Ãâ™—“Œ³\x85\n的", max_size=60))
@example("Ã " + "x" * 20 + "\nÃ b" + "y" * 30 + "Â a caf\xc3\xa9 ГўВЂВ.a" + "z" * 30 + "Ã ")
def test_mojibake_is_what_ftfy_counts_in_each_line(text):
    found = figures("a" + text, "en")["mojibake"]
    assert found * len("a" + text) == pytest.approx(sum(map(badness, ("a" + text).split("\n"))))


@given(
    st.lists(st.sampled_from(["The", "to,", "(with)", "of", "ofx", "other", "HAVE!", "-be"]), min_size=1, max_size=40)
)
def test_stop_words_are_counted_wherever_they_are(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "_SOME_WORDS", 3)
        found = figures("\u3000".join(words), "en")["stop_words"]
    assert found == len({"the", "to", "with", "of", "have"} & {word.strip(",()!").lower() for word in words})


@given(st.text(max_size=400), st.sampled_from(["en", "zh", "fr"]))
def test_shares_are_shares(text, language):
    for name, value in figures(text, language).items():
        assert value >= 0
        if name.startswith(("dup_", "end_", "short_", "bullet_", "ellipsis_")) and not name.endswith("gram"):
            assert value <= 1
