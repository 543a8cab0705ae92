import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnllm.data.corpus import find_files, kind_of
from tnllm.data.documents import BadDocument
from tnllm.data.inspect import inspect_corpus
from tnllm.data.remote import read_documents
from tnllm.errors import RunError, UserError

zstandard = pytest.importorskip("zstandard")

TEXTS = ["Once upon a time.\nThere was a king.", "从前有一个国王。", "", "\ttabs and  spaces \r\n"]


def records(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path: Path, data: bytes) -> Path:
    compressors = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    path.write_bytes(compressors.get(path.suffix, bytes)(data))
    return path


def texts_of(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents([path], **options)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_json_lines_compressed_and_not(tmp_path, suffix):
    path = write(tmp_path / f"web.jsonl{suffix}", records())
    found = list(read_documents([path]))
    assert [document.text for document in found] == TEXTS
    assert [document.line for document in found] == [1, 2, 3, 4]
    assert found[1].where == f"{path}:2"
    assert found[1].record == {"id": 1}
    assert found[-1].position <= path.stat().st_size


def test_concatenated_frames_are_one_file(tmp_path):
    path = tmp_path / "web.jsonl.zst"
    data = records()
    path.write_bytes(zstandard.compress(data[:20]) + zstandard.compress(data[20:]))
    assert texts_of(path) == TEXTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "web.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "id": [0, 1, 2, 3, 4]}), path)
    bad: list[BadDocument] = []
    found = list(read_documents([path], on_bad=bad.append))
    assert [document.text for document in found] == TEXTS
    assert found[1].record == {"id": 1}
    assert [str(item) for item in bad] == [f"{path}:5: field 'text' is null, not text"]
    with pytest.raises(UserError, match=r"no column 'body' \(columns: text, id; choose one of them\)"):
        texts_of(path, field="body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match="is not a complete parquet file"):
        texts_of(path)


def test_a_text_file_is_one_document_or_split_as_asked(tmp_path):
    path = write(tmp_path / "book.txt", b"\xef\xbb\xbfone\ntwo\n\n \n\nthree\r\nfour")
    assert texts_of(path) == ["one\ntwo\n\n \n\nthree\r\nfour"]
    assert texts_of(path, split_on="blank-line") == ["one\ntwo", "three\r\nfour"]
    assert [text for text in texts_of(path, split_on="line") if text.strip()] == ["one", "two", "three", "four"]
    assert [document.line for document in read_documents([path], split_on="blank-line")] == [1, 6]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_files_are_read_as_they_are(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(texts_of(path)) == text.removeprefix("\ufeff")


def test_a_long_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("tnllm.data.corpus._MAX_TEXT_CHARS", 10)
    path = write(tmp_path / "book.txt", b"12345\n67890\nabc\n")
    assert texts_of(path) == ["12345\n67890\n", "abc\n"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "invalid JSON (Unterminated string starting at, column 10)"),
        (b'{"body": "x", "id": 1}', "no field 'text' (fields: body, id; choose one of them)"),
        (b"[" * 100_000, "JSON that is nested too deeply"),
        (b'{"text": 5}', "field 'text' is a number, not text"),
        (b'["x"]', "a list where an object is expected"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 14 of the line)"),
        (b'{"text": "\\ud800"}', "field 'text' holds a lone surrogate, which is not Unicode text"),
    ],
)
def test_unreadable_records_are_located(tmp_path, line, reason):
    path = write(tmp_path / "web.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(UserError) as error:
        texts_of(path)
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert str(error.value).endswith("; fix it")
    bad: list[BadDocument] = []
    assert texts_of(path, on_bad=bad.append) == ["good", "good too"]
    assert len(bad) == 1 and str(bad[0]).startswith(f"{path}:3: {reason}")


def test_text_that_is_not_utf8_is_located(tmp_path):
    path = write(tmp_path / "latin.txt", "first\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt:2: not UTF-8 \(byte 4 of the line\)"):
        texts_of(path)


def test_a_json_array_is_explained(tmp_path):
    path = write(tmp_path / "all.json", b'[\n{"text": "x"}\n]')
    with pytest.raises(UserError, match=r"is one JSON array; write one object a line"):
        texts_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    path = write(tmp_path / f"web.jsonl{suffix}", records([str(i**5) for i in range(5000)]))
    path.write_bytes(path.read_bytes()[:-7] if damage == "cut" else b"this was never compressed")
    with pytest.raises(RunError, match=f"web.jsonl{suffix} is cut short or damaged after line"):
        texts_of(path)


def test_files_of_folders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.jsonl", "b/1.txt.zst", "a.parquet", "c.json.gz", "notes.pdf", "script.gz", "info.json", ".a.txt"):
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path])]
    assert found == ["a.parquet", "b/1.txt.zst", "b/2.jsonl", "c.json.gz"]
    assert find_files([tmp_path / "info.json"]) == [tmp_path / "info.json"]
    assert kind_of(Path("x.JSONL.GZ")) == "jsonl"
    assert kind_of(Path("x.parquet.gz")) is None


def test_inputs_that_are_not_a_corpus(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.txt").touch()
    for inputs, message in (
        (["nowhere.txt"], "no such file or folder: nowhere.txt"),
        ([tmp_path / "a.pdf"], "a.pdf is not in a known corpus format; allowed: .txt"),
        ([tmp_path / "empty"], "empty holds no corpus file; allowed: .txt"),
        ([tmp_path / "a.txt", tmp_path / "a.txt"], "a.txt is given twice; name each file once"),
    ):
        with pytest.raises(UserError) as error:
            find_files(inputs)
        assert message in str(error.value)


def test_progress_reaches_the_end(tmp_path):
    paths = [write(tmp_path / "a.jsonl", records()), write(tmp_path / "b.txt", b"text\n")]
    seen = []
    list(read_documents(paths, report=seen.append))
    assert [status.documents for status in seen] == [1, 2, 3, 4, 5]
    assert seen[-1].done_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in paths)


def test_letters_of_a_long_text_are_counted_in_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "天 " * 500_000}, ensure_ascii=False))
    tracemalloc.start()
    found = inspect_corpus([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["letters_by_script"] == {"han": 500_000}
    # A few copies of the line and its text; a list of its letters alone would take twenty times as much as the file.
    assert peak < 10 * path.stat().st_size
