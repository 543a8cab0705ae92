import json

from tnllm.cleaning.input_shards import fingerprint, plan_shards
from tnllm.cleaning.records import RecordWriter
from tnllm.data.corpus import read_file
from tnllm.data.documents import Document


def test_a_large_file_is_cut_at_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"文{n}" * (n % 9 + 1)}) + "\n" for n in range(300)), encoding="utf-8")
    whole = list(read_file(path))
    shards = plan_shards([path], 700)
    assert len(shards) > 10 and all(len(shard) == 1 for shard in shards)
    found = [doc for shard in shards for doc in read_file(path, span=shard[0].span)]
    assert [(doc.text, doc.line, doc.position) for doc in found] == [(d.text, d.line, d.position) for d in whole]
    assert sum(shard[0].size for shard in shards) == path.stat().st_size


def test_small_and_compressed_files(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x" * 40)
    with RecordWriter(tmp_path / "d.jsonl.gz") as writer:
        for n in range(99):
            writer.write({"text": str(n) * 50})
    files = sorted(tmp_path.iterdir())
    shards = plan_shards(files, 100)
    assert [[str(piece.file)[-5:] for piece in shard] for shard in shards] == [["a.txt", "b.txt"], ["c.txt"], ["nl.gz"]]


def test_a_long_line_is_not_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 5_000_000 + '"}\n{"text": "three"}\n')
    found = list(read_file(path, max_line_bytes=1000))
    assert [getattr(item, "text", None) for item in found] == ["one", None, "three"]
    assert found[1].where == f"{path}:2" and "longer than 1000 B (input.max_line_mb)" in found[1].reason
    assert isinstance(found[2], Document) and found[2].line == 3


def test_fingerprint_detects_changes_at_both_ends(tmp_path):
    path = tmp_path / "a"
    fingerprints = set()
    for text in ("a" * 200_000, "b" + "a" * 199_999, "a" * 199_999 + "b", "a" * 200_001):
        path.write_text(text)
        fingerprints.add(fingerprint(path))
    assert len(fingerprints) == 4
