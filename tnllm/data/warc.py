"""Pages of web archives: the text of WET files as it is, and the main text of the HTML in WARC files.

for document in read_archive(Path("CC-MAIN.warc.gz")):
    document.record["url"]
"""

import re
from collections.abc import Iterator
from pathlib import Path

from tnllm.data.compressed import damage_as_unreadable, open_stored
from tnllm.data.documents import Document, UnreadableFile
from tnllm.errors import optional_import

# Finding a page's main text takes time quadratic in the depth of these elements. Browsers stop nesting at 512, too.
_NESTED = re.compile(r"<(/?)(?:div|article)\b[^<>]*>", re.IGNORECASE)
_MAX_DEPTH = 512
_PAGES = ("text/html", "application/xhtml+xml", "text/plain")


def read_archive(path: Path) -> Iterator[Document]:
    """Every page in order; `line` counts records from 1. Records that are not pages of text are skipped.

    HTML is decoded by its declared or detected encoding and reduced to its main text. Raises UnreadableFile for a file that
    holds no complete record, is damaged or ends too early.
    """
    with optional_import("data", "resiliparse"):
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    number = 0
    with (
        open_stored(path) as raw,
        damage_as_unreadable(lambda: f"{path} is cut short or damaged after record {number}"),
    ):
        wanted = WarcRecordType.response | WarcRecordType.conversion
        for number, record in enumerate(ArchiveIterator(raw, record_types=WarcRecordType.any_type), 1):
            length = record.content_length
            if not record.record_type & wanted:
                continue
            kind = record.http_content_type or record.headers.get("Content-Type") or "text/plain"
            if kind.split(";")[0].strip().lower() not in _PAGES:
                continue
            body = record.reader.read()
            if len(body) < length:
                # fastwarc does not notice that a file is cut short.
                raise EOFError(f"record {number} has {len(body)} of {length} bytes")
            if record.record_type == WarcRecordType.conversion:
                text = body.decode("utf-8", "replace")
            else:
                try:
                    html = bytes_to_str(body, record.http_charset or detect_encoding(body) or "utf-8")
                except (LookupError, ValueError):
                    # An encoding that does not exist, such as "tf-8".
                    html = bytes_to_str(body, "utf-8")
                text = extract_plain_text(_shallow(html), main_content=True, alt_texts=False)
            fields = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date")}
            yield Document(text, path, number, raw.tell(), fields)
    if number == 0:
        raise UnreadableFile(f"{path} holds no WARC record; it is empty or not a web archive")


def _shallow(html: str) -> str:
    """`html` without the tags of `_NESTED` elements that lie deeper than `_MAX_DEPTH` of them."""
    depth = 0

    def kept(tag: re.Match[str]) -> str:
        nonlocal depth
        is_deep = depth > _MAX_DEPTH if tag[1] else depth >= _MAX_DEPTH
        depth = max(0, depth - 1) if tag[1] else depth + 1
        return "" if is_deep else tag[0]

    return _NESTED.sub(kept, html)
