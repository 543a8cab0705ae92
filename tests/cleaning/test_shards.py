import json

import pytest

from tnllm.cleaning.shards import Lines, fingerprint, locked, plan_shards, read_lines
from tnllm.data.corpus import Document, read_file
from tnllm.errors import RunError, UserError


def test_a_large_file_is_cut_at_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"文{n}" * (n % 9 + 1)}) + "\n" for n in range(300)), encoding="utf-8")
    whole = list(read_file(path))
    shards = plan_shards([path], 700)
    assert len(shards) > 10 and all(len(shard) == 1 for shard in shards)
    found = [doc for shard in shards for doc in read_file(path, span=shard[0].to_span())]
    assert [(doc.text, doc.line, doc.position) for doc in found] == [(d.text, d.line, d.position) for d in whole]
    assert sum(shard[0].size for shard in shards) == path.stat().st_size


def test_small_and_packed_files(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x" * 40)
    with Lines(tmp_path / "d.jsonl.gz") as lines:
        for n in range(99):
            lines.write({"text": str(n) * 50})
    files = sorted(tmp_path.iterdir())
    shards = plan_shards(files, 100)
    assert [[piece.path[-5:] for piece in shard] for shard in shards] == [["a.txt", "b.txt"], ["c.txt"], ["nl.gz"]]


def test_lines_are_whole_or_absent_and_always_the_same(tmp_path):
    for name in ("a", "b"):
        with Lines(tmp_path / name / "x.jsonl.gz") as lines:
            lines.write({"text": "字\n", "n": 1})
    assert (tmp_path / "a" / "x.jsonl.gz").read_bytes() == (tmp_path / "b" / "x.jsonl.gz").read_bytes()
    assert list(read_lines(tmp_path / "a" / "x.jsonl.gz")) == [{"text": "字\n", "n": 1}]
    with pytest.raises(ValueError), Lines(tmp_path / "c.jsonl.gz") as lines:
        lines.write({"text": "x"})
        raise ValueError
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_long_line_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 5_000_000 + '"}\n{"text": "three"}\n')
    found = list(read_file(path, max_line_bytes=1000))
    assert [getattr(item, "text", None) for item in found] == ["one", None, "three"]
    assert found[1].where == f"{path}:2" and "beyond the length" in found[1].reason
    assert isinstance(found[2], Document) and found[2].line == 3


def test_fingerprint_tells_changes_at_both_ends(tmp_path):
    path = tmp_path / "a"
    marks = set()
    for text in ("a" * 200_000, "b" + "a" * 199_999, "a" * 199_999 + "b", "a" * 200_001):
        path.write_text(text)
        marks.add(fingerprint(path))
    assert len(marks) == 4


def test_damage_is_named(tmp_path):
    with Lines(tmp_path / "x.jsonl.gz") as lines:
        lines.write({"text": "x"})
    data = (tmp_path / "x.jsonl.gz").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(data[:-9])
    with pytest.raises(RunError, match=r"x.jsonl.gz is cut short or damaged"):
        list(read_lines(tmp_path / "x.jsonl.gz"))


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is cleaning into"), locked(tmp_path):
        pass
