"""One bad file, page, row or column costs itself, is named, and is counted; in every command that reads a corpus."""

import bz2
import datetime
import json
import lzma
import os
from decimal import Decimal
from pathlib import Path

import pytest

from tnllm import assets
from tnllm.cleaning.records import read_folder
from tnllm.cleaning.run import clean
from tnllm.cleaning.settings import only_dedup
from tnllm.data.corpus import find_files, read_file
from tnllm.data.documents import BadDocument, Document
from tnllm.data.encode import Options
from tnllm.data.folders import refuse_replacing
from tnllm.data.inspect import inspect_corpus
from tnllm.data.remote import read_documents
from tnllm.data.tokenize import tokenize_corpus
from tnllm.errors import RunError, UserError
from tnllm.evaluation.datasets import read_rows
from tnllm.tokenizer import Tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"Text number {number} of the corpus, which is long enough to be kept." for number in range(40)]


def tokenized(path: Path, out: Path, **options) -> int:
    tokenizer = Tokenizer.load(assets.tokenizer_model())
    manifest = tokenize_corpus(find_files([path]), out, tokenizer, Options(val_fraction=0), workers=1, **options)
    return manifest.total("documents")


def cleaned(path: Path, out: Path) -> tuple[list[dict], dict]:
    report = clean(only_dedup(path=(str(path),), threshold=1), out, 1, lambda progress: None)
    return list(read_folder(out / "clean")), report


def columns_of(count: int) -> dict:
    """Columns with a value that Python cannot hold, or that JSON cannot, in every second row."""

    def half(good, bad):
        return [bad if number % 2 else good for number in range(count)]

    return {
        "far date": pa.array(half(0, 10_000_000), pa.int32()).cast(pa.date32()),
        "far timestamp": pa.array(half(0, 2**50), pa.int64()).cast(pa.timestamp("s")),
        "long duration": pa.array(half(1, 2**50), pa.int64()).cast(pa.duration("s")),
        "zone": pa.array(half(None, 0), pa.timestamp("us", "Mars/Olympus_Mons")),
        "image": pa.array(half(b"plain", b"\xff\xd8\xff"), pa.binary()),
        "nested": pa.array(half([0], [10_000_000]), pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
    }


def test_values_that_cannot_be_held_cost_their_field_only(tmp_path):
    path = tmp_path / "far.parquet"
    columns = columns_of(40)
    pq.write_table(pa.table({"text": TEXTS, "id": range(40), **columns}), path)
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == TEXTS
    assert documents[0].record == {
        "id": 0, "far date": "1970-01-01", "far timestamp": "1970-01-01T00:00:00", "long duration": 1.0, "zone": None,
        "image": "plain", "nested": ["1970-01-01"],
    }  # fmt: skip
    assert documents[1].record == {"id": 1} and set(documents[1].lost) == set(columns)
    assert tokenized(path, tmp_path / "tokens") == 40
    assert inspect_corpus([path])["documents"] == 40
    kept, report = cleaned(path, tmp_path / "out")
    assert [record["text"] for record in kept] == TEXTS and [record["id"] for record in kept] == list(
        map(str, range(40))
    )
    assert sorted(report["lost_fields"].values()) == [20] * 6
    assert any(name.startswith(f"far date of {path}: a date32[day] that") for name in report["lost_fields"])
    assert [row["id"] for _, row in read_rows(path)] == list(range(40))


def test_values_with_a_form_in_json_take_it(tmp_path):
    path = tmp_path / "kinds.parquet"
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 10)
    columns = {
        "time": pa.array([when], pa.timestamp("us", "UTC")), "price": [Decimal("1.50")], "nan": [float("nan")],
        "pairs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "day": [when.date()],
        "words": pa.array(["x"]).dictionary_encode(),
    }  # fmt: skip
    pq.write_table(pa.table({"text": pa.array([b"caf\xc3\xa9"], pa.binary()), **columns}), path)
    (document,) = read_documents([path])
    assert document.text == "café" and document.lost == {}
    assert document.record == {
        "time": "2024-05-06T07:08:09.000010+00:00", "price": "1.50", "nan": None, "pairs": [["a", 1]],
        "day": "2024-05-06", "words": "x",
    }  # fmt: skip


def test_only_the_text_is_read_where_only_the_text_is_needed(tmp_path):
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"text": TEXTS, "other": [text * 3 for text in TEXTS]}), path, compression="none")
    damage(path, column=1)
    assert tokenized(path, tmp_path / "tokens") == 40
    assert inspect_corpus([path])["bad_documents"] == 0


def damage(path: Path, column: int = 0, group: int = 0) -> None:
    """Overwrite the middle of a column chunk."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 3 : start + chunk.total_compressed_size - 3] = b"\xff" * (chunk.total_compressed_size - 6)
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "none"])
def test_a_damaged_page_costs_its_rows_and_is_named(tmp_path, compression, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    good, bad = folder / "a.parquet", folder / "b.parquet"
    pq.write_table(pa.table({"text": TEXTS}), good)
    pq.write_table(pa.table({"text": [text + "!" for text in TEXTS]}), bad, compression=compression, row_group_size=10)
    damage(bad, group=1)
    kept, report = cleaned(folder, tmp_path / "out")
    assert len(kept) == 70 and report["steps"][0]["reasons"] == {"unreadable": 1}
    (named,) = report["unreadable"]
    assert named.startswith(f"{bad}:11: the file is damaged; rows 11 to 20 are lost: ")
    assert tokenized(folder, tmp_path / "tokens", on_error="skip") == 70
    assert f"left out: {bad}:11: the file is damaged" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"b.parquet:11: the file is damaged"):
        tokenized(folder, tmp_path / "stopped")
    summary = inspect_corpus(find_files([folder]))
    assert (summary["documents"], summary["bad_documents"]) == (70, 1) and str(bad) in summary["bad"][0]
    with pytest.raises(UserError, match=r"b.parquet:11: the file is damaged.*; fetch the file again"):
        list(read_rows(bad))


def test_files_that_are_not_what_they_say_cost_themselves(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-30])
    pq.write_table(pa.table({"body": TEXTS}), folder / "c.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"]), folder / "d.parquet")
    (folder / "e.jsonl.xz").write_bytes(lzma.compress(b'{"text": "one"}\n') + b"junk")
    (folder / "f.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "two"}\n') + bz2.compress(b"")[:5])
    (folder / "g.jsonl.zst").write_bytes(b"")
    (folder / "h.warc").write_bytes(b"no archive")
    (folder / "i.jsonl").write_text('[\n{"text": "three"}]')
    left_out: list[BadDocument] = []
    texts = [document.text for document in read_documents(find_files([folder]), on_bad=left_out.append)]
    assert texts == [*TEXTS, "one", "two"]
    named = [str(item) for item in left_out]
    for name, why in (
        ("b.parquet", "is not a complete parquet file"), ("c.parquet", "no column 'text' (columns: body; choose"),
        ("d.parquet", "more than one column 'text'"), ("e.jsonl.xz", "is cut short or damaged after line 1"),
        ("f.jsonl.bz2", "is cut short or damaged after line 1"), ("g.jsonl.zst", "is cut short or damaged after line 0"),
        ("h.warc", "record"), ("i.jsonl", "is one JSON array"),
    ):  # fmt: skip
        assert sum(name in item and why in item for item in named) == 1, name
    assert len(named) == 8
    assert tokenized(folder, tmp_path / "tokens", on_error="skip") == 42
    assert cleaned(folder, tmp_path / "out")[1]["steps"][0]["reasons"] == {"unreadable": 8}


def test_zero_padding_between_xz_streams_is_part_of_the_format(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "one"}\n') + bytes(8) + lzma.compress(b'{"text": "two"}\n') + bytes(4))
    assert [document.text for document in read_documents([path])] == ["one", "two"]


def zstd_frame(path: Path, text: bytes, window_log: int) -> None:
    """A frame of raw blocks; the one library call that makes a window this large would need its memory."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window_log - 10) << 3])
    frame += ((len(text) << 3) | 1).to_bytes(3, "little") + text
    path.write_bytes(frame)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_windows_up_to_the_format_s_limit(tmp_path, window_log):
    path = tmp_path / "long.jsonl.zst"
    zstd_frame(path, b'{"text": "far back"}\n', window_log)
    assert [document.text for document in read_documents([path])] == ["far back"]


def test_a_limit_of_the_decoder_is_not_called_damage(tmp_path):
    path = tmp_path / "long.jsonl.zst"
    zstd_frame(path, b'{"text": "too far back"}\n', 32)
    with pytest.raises(RunError) as error:
        list(read_documents([path]))
    assert "needs a window of 4.00 GiB, more than zstd's own limit of 2.00 GiB; compress it" in str(error.value)
    words = zstandard.train_dictionary(2000, [text.encode() * 4 for text in TEXTS])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(b'{"text": "short for"}\n'))
    with pytest.raises(RunError, match=r"was compressed with a dictionary, .* zstd -D first"):
        list(read_documents([path]))


def test_frames_that_are_to_be_skipped_are(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
    path.write_bytes(skipped + zstandard.compress(b'{"text": "one"}\n') + skipped)
    assert [document.text for document in read_documents([path])] == ["one"]


def test_linked_folders_are_followed_once(tmp_path, capsys):
    elsewhere, corpus = tmp_path / "elsewhere", tmp_path / "corpus"
    for folder in (elsewhere / "deep", corpus / "own"):
        folder.mkdir(parents=True)
    (corpus / "own" / "a.jsonl").write_text('{"text": "in the folder"}\n')
    (elsewhere / "deep" / "b.jsonl").write_text('{"text": "behind the link"}\n')
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "again").symlink_to(elsewhere / "deep")
    (corpus / "own" / "loop").symlink_to(corpus)
    (elsewhere / "back").symlink_to(corpus / "own")
    (corpus / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    (corpus / "twin.jsonl").symlink_to(corpus / "own" / "a.jsonl")
    files = find_files([corpus])
    texts = sorted(document.text for document in read_documents(files))
    assert texts == ["behind the link", "in the folder"]
    named = capsys.readouterr().err
    assert f"left out: {corpus}/lost.jsonl is a link to nothing" in named
    assert f"left out: {corpus}/own/a.jsonl is another name of {corpus}/twin.jsonl" in named
    only_links = tmp_path / "only"
    only_links.mkdir()
    (only_links / "part").symlink_to(elsewhere)
    assert len(find_files([only_links])) == 2


def test_an_output_never_replaces_an_input(tmp_path):
    (tmp_path / "out" / "clean").mkdir(parents=True)
    text = tmp_path / "out" / "clean" / "00000.jsonl"
    text.write_text('{"text": "mine"}\n')
    (tmp_path / "same").symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "same", text):
        with pytest.raises(UserError, match="would replace its own input"):
            refuse_replacing([text], out)
    refuse_replacing([text], tmp_path / "out" / "clean" / "other")
    for given in (text, text.parent, tmp_path / "out"):
        with pytest.raises(UserError, match="would replace its own input"):
            cleaned(given, tmp_path / "out")
    with pytest.raises(UserError, match="would replace its own input"):
        clean(only_dedup(path=(str(text),)), tmp_path / "same", 1, lambda progress: None, overwrite=True)
    with pytest.raises(UserError, match="would replace its own input"):
        tokenized(text, tmp_path / "out")
    assert text.read_text() == '{"text": "mine"}\n'


def test_the_output_below_the_input_is_not_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    for _ in range(2):
        assert len(cleaned(tmp_path, tmp_path / "out")[0]) == 1


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a.txt").write_text("text")
    for command in (cleaned, tokenized):
        with pytest.raises(UserError, match="is a file, not a folder"):
            command(tmp_path / "a.txt", tmp_path / "file" / "out")
        with pytest.raises(UserError, match="nothing can be written into /proc"):
            command(tmp_path / "a.txt", Path("/proc/out"))


def test_fields_that_json_cannot_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one", "title": "\\ud800", "score": NaN}', '{"text": "two", "title": "\\ud83d\\ude00"}']
    # Python reads integers of up to 4,300 digits.
    lines.append(f'{{"text": "three", "ok": -{"9" * 4300}, "score": {"9" * 5000}}}')
    path.write_text("\n".join(lines))
    kept, report = cleaned(path, tmp_path / "out")
    assert [record.get("title") for record in kept] == [None, "😀", None] and kept[0]["score"] is None
    assert [kept[2][key] for key in ("text", "ok", "score")] == ["three", 1 - 10**4300, None]
    assert list(report["lost_fields"].values()) == [1] and next(iter(report["lost_fields"])).startswith(
        f"title of {path}"
    )


def test_the_text_that_is_asked_for_is_the_text_that_is_kept(tmp_path):
    """A record may have fields of the names that the result uses itself."""
    path = tmp_path / "a.jsonl"
    record = {
        "content": "the text",
        "text": "another",
        "id": "other",
        "url": "u",
        "source": "s",
        "rejected": {"old": 1},
    }
    path.write_text(json.dumps(record) + "\n")
    settings = only_dedup(path=(str(path),), field="content", id_field="url")
    report = clean(settings, tmp_path / "out", 1, lambda progress: None)
    (kept,) = read_folder(tmp_path / "out" / "clean")
    assert (kept["text"], kept["id"], kept["source"]) == ("the text", "u", "s") and "rejected" not in kept
    assert sorted(name.split()[0] for name in report["lost_fields"]) == ["id", "text"]


@pytest.mark.parametrize("group", [0, 1, 3])
def test_a_damaged_page_of_another_column_costs_that_column(tmp_path, group):
    """In the first, a middle and the last row group; the texts of these rows are all kept."""
    path = tmp_path / "other.parquet"
    columns = {"text": TEXTS, "number": range(40), "note": [text * 3 for text in TEXTS]}
    pq.write_table(pa.table(columns), path, row_group_size=10, write_page_checksum=True)
    damage(path, column=2, group=group)
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == TEXTS
    assert [document.record["number"] for document in documents] == list(range(40))
    lost = [number for number, document in enumerate(documents) if document.lost]
    assert lost == list(range(group * 10, group * 10 + 10))
    _, report = cleaned(path, tmp_path / "out")
    assert report["lost_fields"] == {f"note of {path}: in a damaged part of the file": 10}


def test_text_that_is_not_utf8_in_a_column_costs_its_row(tmp_path):
    path = tmp_path / "bytes.parquet"
    data = pa.array([b"first text", b"\xff\xfe", b"third text"], pa.binary())
    text = pa.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    pq.write_table(pa.table({"text": text, "other": ["a", "b", "c"]}), path)
    bad: list[BadDocument] = []
    assert [document.text for document in read_documents([path], on_bad=bad.append)] == ["first text", "third text"]
    assert [str(item) for item in bad] == [f"{path}:2: field 'text' is a string that is not UTF-8"]


def test_an_encrypted_file_is_not_called_damaged(tmp_path):
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, name):
            return key.hex()

        def unwrap_key(self, key, name):
            return bytes.fromhex(key)

    factory = encryption.CryptoFactory(lambda config: Keys())
    for plain in (True, False):
        how = encryption.EncryptionConfiguration(footer_key="k", column_keys={"k": ["text"]}, plaintext_footer=plain)
        path = tmp_path / f"{plain}.parquet"
        properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
        table = pa.table({"text": TEXTS})
        with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
            writer.write_table(table)
        bad: list[BadDocument] = []
        assert list(read_documents([path], on_bad=bad.append)) == []
        assert "encrypted" in str(bad[0]) and "the file is damaged" not in str(bad[0])


def test_an_empty_gz_is_no_empty_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(RunError, match=r"a.jsonl.gz is cut short or damaged after line 0: the file is empty"):
        list(read_documents([tmp_path / "a.jsonl.gz"]))


def test_files_of_other_kinds_in_a_folder_are_counted(tmp_path, capsys):
    for name in ("a.jsonl", "b.csv", "c.csv", "d.jsonl.lz4", "LICENSE"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "gone").symlink_to("nowhere")
    assert find_files([tmp_path]) == [tmp_path / "a.jsonl"]
    said = capsys.readouterr().err
    assert f"files of {tmp_path} that are of other kinds: .csv (2), " in said
    assert ".lz4 (1)" in said and "LICENSE (1)" in said and f"{tmp_path / 'gone'} is a link to nothing" in said


def test_a_name_that_is_not_utf8_costs_its_file(tmp_path, capsys):
    for name in (b"a\xff.jsonl", b"b.jsonl"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text('{"text": "a text"}\n')
    assert tokenized(tmp_path, tmp_path / "tokens") == 1
    assert [record["text"] for record in cleaned(tmp_path, tmp_path / "out")[0]] == ["a text"]
    assert capsys.readouterr().err.count("has a name that is not UTF-8") == 2
    with pytest.raises(UserError, match="has a name that is not UTF-8; rename it"):
        find_files([os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl")])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf16_without_a_mark_is_unreadable_and_not_text_full_of_nuls(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Some words.\r\n\r\nAnd more of them.\n".encode(encoding))
    items = list(read_file(tmp_path / "a.txt"))
    assert items and all(isinstance(item, BadDocument) and "UTF-16" in item.reason for item in items)
    (tmp_path / "a.jsonl").write_bytes('{"text": "some words"}\n'.encode(encoding))
    assert all("UTF-16" in item.reason for item in read_file(tmp_path / "a.jsonl"))
    # One stray NUL is text.
    (tmp_path / "b.txt").write_bytes(b"Some words\x00 and more of them.\n")
    assert [type(item) for item in read_file(tmp_path / "b.txt")] == [Document]
