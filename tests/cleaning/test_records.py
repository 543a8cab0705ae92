import pytest

from tnllm.cleaning.records import RecordWriter, read_folder, read_records
from tnllm.errors import RunError


def test_files_are_complete_or_absent_and_always_the_same(tmp_path):
    for name in ("a", "b"):
        with RecordWriter(tmp_path / name / "x.jsonl.gz") as writer:
            writer.write({"text": "字\n", "n": 1})
    assert (tmp_path / "a" / "x.jsonl.gz").read_bytes() == (tmp_path / "b" / "x.jsonl.gz").read_bytes()
    assert list(read_records(tmp_path / "a" / "x.jsonl.gz")) == [{"text": "字\n", "n": 1}]
    with pytest.raises(ValueError), RecordWriter(tmp_path / "c.jsonl.gz") as writer:
        writer.write({"text": "x"})
        raise ValueError
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_damage_is_named(tmp_path):
    with RecordWriter(tmp_path / "x.jsonl.gz") as writer:
        writer.write({"text": "x"})
    data = (tmp_path / "x.jsonl.gz").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(data[:-9])
    with pytest.raises(RunError, match=r"x.jsonl.gz is cut short or damaged"):
        list(read_records(tmp_path / "x.jsonl.gz"))


def test_a_folder_is_read_in_order_of_names(tmp_path):
    for name in ("filter-1", "filter-0", "dedup-0"):
        with RecordWriter(tmp_path / f"{name}.jsonl.gz") as writer:
            writer.write({"from": name})
    assert [record["from"] for record in read_folder(tmp_path)] == ["dedup-0", "filter-0", "filter-1"]
    assert [record["from"] for record in read_folder(tmp_path, "filter-")] == ["filter-0", "filter-1"]
