import gzip

import pytest

from tnllm.data.corpus import find_files, kind_of, read_file
from tnllm.data.documents import BadDocument, Document

LATIN = "text/html; charset=latin-1"
HTML = "<html><head><title>T</title></head><body><nav><a href=/>Home</a></nav><main><p>{}</p></main></body></html>"


def record(kind, body, uri, media):
    http = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\n\r\n".encode() if kind == "response" else b""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Date: 2024-05-18T01:58:10Z\r\n"
    mime = "application/http; msgtype=response" if kind == "response" else media
    return (
        f"{head}Content-Type: {mime}\r\nContent-Length: {len(http + body)}\r\n\r\n".encode() + http + body + b"\r\n\r\n"
    )


@pytest.fixture
def pages():
    long = "This is the main text of a page, long enough to be taken for one. " * 5
    return [
        record("response", HTML.format(long).encode(), "http://a.example/1", "text/html; charset=utf-8"),
        record("response", b"\x89PNG", "http://a.example/2.png", "image/png"),
        record("response", HTML.format("café " + long).encode("latin-1"), "http://a.example/3", LATIN),
        record("conversion", "网页的正文。".encode(), "http://a.example/4", "text/plain"),
    ]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.wet.gz"])
def test_pages_are_read(tmp_path, pages, name):
    path = tmp_path / name
    path.write_bytes(b"".join(map(gzip.compress, pages)) if name.endswith("gz") else b"".join(pages))
    assert kind_of(path) == "archive" and find_files([tmp_path]) == [path]
    found = [item for item in read_file(path) if isinstance(item, Document)]
    assert [item.line for item in found] == [1, 3, 4]
    assert found[0].text.startswith("This is the main text") and "Home" not in found[0].text
    assert found[1].text.startswith("café This") and found[2].text == "网页的正文。"
    assert found[0].record == {"url": "http://a.example/1", "date": "2024-05-18T01:58:10Z"}


@pytest.mark.parametrize("charset", ["tf-8", "hex", "undefined", "a\0b"])
def test_a_page_of_an_encoding_that_does_not_exist_is_read(tmp_path, pages, charset):
    page = record("response", HTML.format("café " * 50).encode(), "http://a.example/5", f"text/html; charset={charset}")
    (tmp_path / "a.warc").write_bytes(page + pages[3])
    first, last = read_file(tmp_path / "a.warc")
    assert first.text.startswith("café") and last.text == "网页的正文。"


def test_damage_is_named(tmp_path, pages):
    packed = b"".join(map(gzip.compress, pages))
    for data in (b"", b"no archive at all", packed[:-12]):
        (tmp_path / "a.warc.gz").write_bytes(data)
        *_, damage = read_file(tmp_path / "a.warc.gz")
        assert isinstance(damage, BadDocument) and damage.is_damage and str(tmp_path / "a.warc.gz") in str(damage)


def test_other_archives_are_not_corpora(tmp_path):
    assert kind_of(tmp_path / "a.warc.wat.gz") is None
