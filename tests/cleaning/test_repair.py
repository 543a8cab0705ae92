import itertools
import random

import ftfy
import pytest
from ftfy.badness import is_bad
from hypothesis import given
from hypothesis import strategies as st

from tests.cleaning import noise
from tests.cleaning.texts import CHINESE, CLASSICAL, ENGLISH
from tnllm.cleaning import repair as repair_module
from tnllm.cleaning.repair import mask_personal_data, remove_boilerplate, repair


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, CLASSICAL])
def test_good_text_is_left_alone(text):
    assert repair(text) == text
    assert remove_boilerplate(text) == (text, 0)
    assert mask_personal_data(text) == (text, 0)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("<p>One &amp; two</p><br/>three<script>var x = '<b>';</script>", "One & two\n\nthree"),
        ("a < b and b > c", "a < b and b > c"),
        ("<!-- nav -->第一段<br>第二段", "第一段\n第二段"),
        ("see https://example.org/a?b=1 or www.example.org/x here", "see or here"),
        ("网址http://example.cn/页面", "网址页面"),
        ("什么！！！！真的？？？好。。。", "什么！真的？好。"),
        ("全角１２３，zero\u200bwidth\ufeff and\xa0space", "全角123，zerowidth and space"),
        ("a\n\n\n\n\nb", "a\n\nb"),
    ],
)
def test_repair(dirty, clean):
    assert repair(dirty) == clean


def test_markdown_and_latex_keep_their_structure():
    text = "# Title ##\n\n---\n\n| a | b |\n|---|---|\n\n***bold***...\n\n"
    text += "$$\\begin{aligned} x &= y \\\\ \\end{aligned}$$\n\n```\nx\n```"
    assert repair(text) == text


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_utf8_read_as_latin1_comes_back(text):
    assert repair(noise.break_encoding(text, random.Random(0))) == text.replace("'", "’").replace('"', "”")


def test_what_is_never_broken_is_nothing_that_ftfy_repairs():
    """The characters that may pass without ftfy, by their kinds, in every sequence of four."""
    for characters in itertools.product("aZ1 .\n\t~中。！‘’“”–—…·", repeat=4):
        text = "".join(characters)
        assert repair_module.NEVER_BROKEN.fullmatch(text) and not is_bad(text), text
    every = "".join(map(chr, range(0x11000)))
    passed = "".join(repair_module.NEVER_BROKEN.findall(every))
    assert (
        ftfy.fix_text(
            passed,
            unescape_html=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            normalization=None,
        )
        == passed
    )


@pytest.mark.parametrize("long", [CHINESE.replace("\n", "") * 20, ENGLISH.replace("\n", " ") * 20])
def test_long_lines_are_repaired_part_by_part(long):
    broken = noise.break_encoding(long, random.Random(0))
    assert len(broken) > 5000 and repair(broken + "\r\n") == long.replace("'", "’").replace('"', "”")


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_tags_of_a_page_go(text):
    flat = text.replace("\n\n", "\n")
    assert repair(noise.add_tags(flat, random.Random(0))) == flat


def test_parts_can_be_left_out():
    assert repair("http://a.example/b !!", urls=False, collapse=False) == "http://a.example/b !!"


@pytest.mark.parametrize(
    "line",
    [
        *noise._LINES_EN,
        *noise._LINES_ZH,
        "This site uses cookies to offer you a better browsing experience.",
        "Subscribe to our weekly newsletter!",
        "No comments:",
        "Home | About us | Contact",
        "news / a / b   ",
        "Shop |  |  | Login",
        "您现在的位置：首页 > 新闻中心",
        "转载请注明出处",
    ],
)
def test_boilerplate_lines_go(line):
    assert remove_boilerplate(f"{ENGLISH}\n{line}\n{CHINESE}") == (f"{ENGLISH}\n{CHINESE}", len(line) + 1)


def test_prose_that_mentions_such_words_stays():
    text = "He asked her about the cookies that she had baked, and she said that the recipe was her grandmother's own."
    assert remove_boilerplate(text) == (text, 0)
    long = "The court held that the privacy policy of the company was no contract. " * 4
    assert remove_boilerplate(long) == (long, 0)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail bob.smith+x@mail.example.com.", "mail <email>."),
        ("邮箱abc@x.com.cn电话13812345678", "邮箱<email>电话<phone>"),
        ("call (555) 123-4567 or 555-123-4567 or +44 20 7946 0958", "call <phone> or <phone> or <phone>"),
        ("电话：010-12345678，手机+86 139 1234 5678", "电话：<phone>，手机<phone>"),
        ("server 8.8.8.8, home 192.168.0.1, local 127.0.0.1", "server <ip>, home 192.168.0.1, local 127.0.0.1"),
    ],
)
def test_personal_data(text, masked):
    assert mask_personal_data(text) == (masked, masked.count("<"))


@pytest.mark.parametrize(
    "text", ["1914-1918, 2014.05.06, 3.14159265358979", "ISBN 978-7-02-002475-1", "v1.2.3.4.5", "a@b"]
)
def test_other_numbers_stay(text):
    assert mask_personal_data(text) == (text, 0)


def test_kinds_of_personal_data_can_be_chosen():
    assert mask_personal_data("a@b.org 8.8.8.8", ["ip"]) == ("a@b.org <ip>", 1)


@given(st.text(max_size=300))
def test_any_text_is_accepted(text):
    repaired = repair(text)
    assert remove_boilerplate(repaired)[1] >= 0
    mask_personal_data(repaired)
