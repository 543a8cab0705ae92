import json

import pytest

from tests.cleaning.texts import CHINESE, ENGLISH
from tnllm.cleaning.decontaminate import Index, build_index, eval_files
from tnllm.errors import UserError

QUESTION = "A farmer fills three barrels with rain water every second day of a dry month; how many are full at its end?"
FRAGE = "某县有三座粮仓，每座每月发放同样多的粮食，若其中一座在第五个月关闭，其余两座应各自增加多少？"


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    record = {"question": QUESTION, "choices": {"text": ["yes", "no"], "label": [1, 2]}, "n": 3}
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n\n")
    (folder / "b.csv").write_text(
        f"id,question\n0,{FRAGE}\n1,the owl sees by night what the hawk missed\n", encoding="utf-8"
    )
    (folder / "notes.md").write_text("not read")
    built = build_index(eval_files([folder]), words=13, characters=24)
    built.save(tmp_path / "index.npz")
    return Index.load(tmp_path / "index.npz")


def test_clean_text_passes(index):
    assert index.names == ("a.jsonl", "b.csv")
    assert index.hits(ENGLISH) == [] == index.hits(CHINESE)


def test_a_question_inside_a_text_is_found(index):
    assert set(index.hits(f"{ENGLISH} {QUESTION.upper()} {ENGLISH}")) == {"a.jsonl"}
    assert set(index.hits(CHINESE + FRAGE.replace("，", " ，") + CHINESE)) == {"b.csv"}


def test_thirteen_words_in_a_row_match(index):
    words = QUESTION.split()
    assert index.hits(" ".join(["But", *words[2:15], "and"])) == ["a.jsonl"]
    assert index.hits(" ".join(["But", *words[2:14], "and"])) == []
    assert index.hits("又说" + FRAGE.replace("，", "")[5:29]) == ["b.csv"]
    assert index.hits("又说" + FRAGE.replace("，", "")[5:28]) == []


def test_a_short_item_matches_as_a_unit(index):
    assert index.hits("they say The owl sees by night what the hawk missed, do they") == ["b.csv"]
    assert index.hits("the owl sees by night what the dove missed") == []


def test_bad_sets_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        eval_files([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds no evaluation file"):
        eval_files([tmp_path])
    (tmp_path / "x.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x.jsonl:1: invalid JSON \(.*recursion"):
        build_index(eval_files([tmp_path]), 13, 24)
    (tmp_path / "x.jsonl").write_text("{}\nnope\n")
    with pytest.raises(UserError, match=r"x.jsonl:2: invalid JSON"):
        build_index(eval_files([tmp_path]), 13, 24)


def test_a_long_field_of_a_table_is_read(tmp_path):
    (tmp_path / "x.csv").write_text(f"id,text\n1,{'a long field of many words ' * 10_000}\n")
    index = build_index(eval_files([tmp_path]), 13, 24)
    assert index.hits("a long field of many words a long field of many words a long field of many")
