"""Text is shown whole characters at a time and cut exactly before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnllm.generation.text import StopFinder, TextStream


def cut_by_hand(text, stops):
    """Scan character by character: the text before the first stop string to be complete, the longer one of two."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def run(pieces, stops):
    finder, out = StopFinder(stops), []
    for piece in pieces:
        out.append(finder.push(piece))
        if finder.stopped:
            break
    else:
        out.append(finder.close())
    return "".join(out), finder.stopped


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_the_cut_does_not_depend_on_the_pieces(pieces, stops):
    assert run(pieces, stops) == cut_by_hand("".join(pieces), stops)


def test_only_a_possible_beginning_is_held_back():
    finder = StopFinder(["END"])
    assert [finder.push(piece) for piece in ("abc", "xE", "N", "x", "E")] == ["abc", "x", "", "ENx", ""]
    assert finder.close() == "E"
    assert not finder.stopped


def test_a_stop_spanning_pieces_is_cut_from_the_first():
    finder = StopFinder(["\nHuman:"])
    assert [finder.push(piece) for piece in ("Yes.\n", "Hum", "an", ": what")] == ["Yes.", "", "", ""]
    assert finder.stopped
    assert finder.close() == ""


def test_without_stops_everything_comes_at_once():
    assert StopFinder([]).push("abc") == "abc"


@pytest.mark.parametrize("text", ["今天天气很好，我们去公园。", "the fox 🦊 and café", "naïve 漢字 mixed"])
def test_characters_are_never_broken(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.close() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_last_character_is_left_out(tokenizer):
    ids = tokenizer.encode("a🦊")
    stream = TextStream(tokenizer)
    assert "".join(stream.push(id) for id in ids[:-1]) + stream.close() == "a"


def test_a_character_split_between_prompt_and_text(tokenizer):
    ids = tokenizer.encode("a🦊b")
    stream = TextStream(tokenizer, before=ids[:-3])
    assert "".join(stream.push(id) for id in ids[-3:]) == "🦊b"


def test_stop_string_across_bytes_of_a_character(tokenizer):
    ids = tokenizer.encode("ab🦊cd")
    stream = TextStream(tokenizer, stop=["🦊c"])
    text = ""
    for id in ids:
        text += stream.push(id)
        if stream.stopped:
            break
    assert (text, stream.stopped) == ("ab", True)
