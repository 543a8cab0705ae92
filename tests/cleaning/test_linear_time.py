"""Cleaning takes time linear in a document's length, whatever it holds: four times the text, about four times the time."""

import json
import time
from pathlib import Path

import pytest

from tnllm import assets
from tnllm.cleaning.blocklist import Blocklist
from tnllm.cleaning.decontaminate import build_index
from tnllm.cleaning.dedup import shingles, signatures
from tnllm.cleaning.hashing import content_hash
from tnllm.cleaning.language import identify
from tnllm.cleaning.repair import mask_personal_data, remove_boilerplate, repair
from tnllm.cleaning.rules import figures
from tnllm.cleaning.settings import DedupSection
from tnllm.data.corpus import read_file
from tnllm.data.inspect import inspect_corpus
from tnllm.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# What a pattern may take for a beginning, repeated without an end.
UNITS = {
    "comments": "<!-- note ", "scripts": "<script> ", "styles": "<style a=b>", "tags": "<a href= ", "entities": "&#x1",
    "addresses": "a.b@c-d.", "numbers": "1.1.", "phones": "+2 (3", "blanks": " ", "lines of blanks": "\n   \t",
    "line ends": "\n",
        "wide blanks": " \u3000", "one letter": "a", "one character": "的", "broken encoding": "Ã©",
    "broken twice": "Ã©\x85\x93", "control": "\x1b[1;",
    "backslashes": "\\", "word joints": "\u2581", "accents": "e\u0301", "capitals": "İΣ", "menus": "\nhome | a",
    "marks": "!?", "dots": "…", "urls": "http://", "quotes": '"',
}  # fmt: skip
SETTINGS = DedupSection()
# Quadratic work would take sixteen times as long; the rest of 4 allows for caches and n log n.
BOUND = 9


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Every function of cleaning that sees a document's text."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "words.txt").write_text("aaaaaaaaab\n的的的的x\n")
    (folder / "evaluation.txt").write_text("a question of more than eight words that nobody has asked before\n")
    blocklist = Blocklist.read([str(folder / "words.txt")], [])
    index = build_index([folder / "evaluation.txt"], 13, 24)
    return [
        repair, remove_boilerplate, mask_personal_data, identify, blocklist.terms_in, index.hits, content_hash,
        lambda text: figures(text, "en"), lambda text: figures(text, "zh"),
        lambda text: signatures([shingles(text, SETTINGS)], SETTINGS),
        # Each million characters are encoded by themselves: these texts are within one.
        Tokenizer.load(assets.tokenizer_model()).encode,
        lambda text: read_as(folder / "a.jsonl", json.dumps({"text": text}), inspect),
        lambda text: read_as(folder / "a.txt", text, inspect),
        *(lambda text, name=name, quoted=quoted: read_as(folder / name, quoted(text), evaluation)
          for name, quoted in (("e.txt", str), ("e.csv", str), ("e.jsonl", json.dumps), ("e.json", json.dumps))),
    ]  # fmt: skip


def read_as(path: Path, content: str, read) -> None:
    path.write_text(content, encoding="utf-8", newline="")
    read(path)


def inspect(path: Path) -> None:
    assert inspect_corpus([path])["documents"] == 1


def evaluation(path: Path) -> None:
    build_index([path], 13, 24)


def seconds(steps, text: str) -> list[float]:
    spent = []
    for step in steps:
        start = time.process_time()
        step(text)
        spent.append(time.process_time() - start)
    return spent


def check(steps, text_of, size: int) -> None:
    """Each step's time at 4 x size is at most BOUND times that at size; a busy machine gets three tries."""
    for _attempt in range(3):
        short, long = seconds(steps, text_of(size)), seconds(steps, text_of(4 * size))
        # Below two milliseconds a clock's tick counts for more than the work.
        ratios = [b / max(a, 0.002) for a, b in zip(short, long, strict=True)]
        if max(ratios) <= BOUND:
            return
    pytest.fail(f"four times the text took {max(ratios):.1f} times as long in step {ratios.index(max(ratios))}")


@pytest.mark.parametrize("unit", UNITS)
def test_every_step_is_linear(steps, unit):
    part = UNITS[unit]
    # The end decides whether a run of blanks is at the end of a line.
    check(steps, lambda size: "Begin" + part * (size // len(part)) + "\u3000end", 16_000)


@pytest.mark.parametrize("item", ["|      ", "|  a  ", "| a b c ", "/ ab", "»\t\t"])
@pytest.mark.parametrize("start", ["home", "首页", "share"])
def test_a_line_of_items_is_linear(start, item):
    """Blanks that could be given to either side of each item once took exponential time."""
    check([remove_boilerplate], lambda size: start + item * size + "-x", 4)


@pytest.mark.parametrize(
    "unit", ["<div>", "<article>", "<b>", "<table>", "<!-- x", "<a b=", "<ol>", "<div><span>", "<b><p>"]
)
def test_reading_a_page_is_linear(tmp_path: Path, unit):
    pytest.importorskip("fastwarc")

    def read(text: str) -> None:
        body = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body>{text}".encode()
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        (tmp_path / "a.warc").write_bytes(head.encode() + body + b"\r\n\r\n")
        assert len(list(read_file(tmp_path / "a.warc"))) == 1

    check([read], lambda size: unit * (size // len(unit)), 20_000)


def test_reading_a_line_is_linear(tmp_path):
    """Of a compressed file whose one block of input is hundreds of times as much output."""
    zstandard = pytest.importorskip("zstandard")

    def read(text: str) -> None:
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress((json.dumps({"text": text}) + "\n").encode()))
        assert [len(document.text) for document in read_file(tmp_path / "a.jsonl.zst")] == [len(text)]

    check([read], lambda size: "x" * size, 8_000_000)
