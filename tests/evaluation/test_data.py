"""Evaluation sets in the layouts they are published in; broken files by file and line; prompts encoded by lines."""

import json

import pytest

from tnllm import assets
from tnllm.errors import UserError
from tnllm.evaluation.cards import PAPER_TASKS, find_card, load_cards, subject_card
from tnllm.evaluation.datasets import _DOCUMENTS
from tnllm.evaluation.prompt_encoding import LineEncoder
from tnllm.tokenizer import Tokenizer

ARC = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
NESTED = {
    "question": {"stem": "Why?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]},
    "answerKey": "2",
}
PIQA = {"goal": "g", "sol1": "x", "sol2": "y"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(lines, encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "file", "content", "split", "subject", "document"),
    [
        ("mmlu", "test/law_test.csv", '"Who, then?",w,x,y,z,C\n', "test", "law",
         {"question": "Who, then?", "subject": "", "choices": ["w", "x", "y", "z"], "answer": 2}),
        ("mmlu", "mmlu_test.jsonl", [{"question": "Q", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3}],
         "test", "law", {"question": "Q", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3}),
        ("ceval-valid", "ceval/val/law_val.csv", "id,question,A,B,C,D,answer\n0,谁？,甲,乙,丙,丁,B\n", "val", "law",
         {"question": "谁？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "B"}),
        ("cmmlu", "test/law.csv", ",Question,A,B,C,D,Answer\n0,谁？,甲,乙,丙,丁,D\n", "test", "law",
         {"Question": "谁？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "D"}),
        ("arc_easy", "ARC-Easy/ARC-Easy-Test.jsonl", [NESTED], "test", None, ARC),
        ("arc_easy", "ai2_arc_ARC_Easy_test.jsonl", [ARC], "test", None, ARC),
        ("arc_easy", "mosaic/arc_easy.jsonl", [{"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}], "test", None,
         {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}),
        ("boolq", "dev.jsonl", [{"question": "q", "passage": "p", "answer": True}], "validation", None,
         {"passage": "p", "question": "q", "label": 1}),
        ("hellaswag", "hellaswag_val.jsonl",
         [{"activity_label": "A", "ctx_a": "a", "ctx_b": "b", "endings": ["1", "2", "3", "4"], "label": 2}], "validation",
         None, {"activity_label": "A", "ctx_a": "a", "ctx_b": "b", "endings": ["1", "2", "3", "4"], "label": "2"}),
        ("winogrande", "dev.jsonl", [{"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "2"}], "validation",
         None, {"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "2"}),
        ("wikitext", "wiki.test.raw", " = A = \n one \n = = part = = \n two \n = B = \n three \n", "test", None,
         {"page": " = A = \n one \n = = part = = \n two \n"}),
    ],
)  # fmt: skip
def test_layouts(tmp_path, task, file, content, split, subject, document):
    write(tmp_path / file, content)
    documents, used_split, path = find_card(task).load(tmp_path, split, subject)
    assert documents[0] == document and used_split == split and path == str(tmp_path / file)
    assert find_card(task).locate(tmp_path) is not None


def test_labels_beside_the_rows_and_files_of_other_tasks(tmp_path):
    write(tmp_path / "dev.jsonl", [{"question": "q", "passage": "p", "answer": True}])
    write(tmp_path / "piqa/dev.jsonl", [PIQA, PIQA])
    write(tmp_path / "piqa/dev-labels.lst", "0\n1\n")
    documents, _, path = find_card("piqa").load(tmp_path, "validation", None)
    assert [row["label"] for row in documents] == [0, 1] and path.endswith("piqa/dev.jsonl")
    write(tmp_path / "piqa/dev-labels.lst", "0\n")
    with pytest.raises(UserError, match=r"dev-labels.lst has 1 labels, dev.jsonl has more rows"):
        find_card("piqa").load(tmp_path, "validation", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"goal": "g", "sol1": "x", "sol2": "y", "label": 0}\n{"goal": \n', r"validation.jsonl:2: not JSON"),
        ([PIQA | {"label": 0}, PIQA], r"validation.jsonl:2: there is no 'label'"),
        ([PIQA | {"label": 7}], r"validation.jsonl:1: the answer is 7; allowed: 0, 1"),
        ("[1]\n", r"validation.jsonl:1: a JSON list; each line must be an object"),
    ],
)
def test_broken_files_are_named_by_line(tmp_path, content, message):
    write(tmp_path / "piqa_plain_text_validation.jsonl", content)
    with pytest.raises(UserError, match=message):
        find_card("piqa").load(tmp_path, "validation", None)


def test_broken_csv_is_named_by_line(tmp_path):
    write(tmp_path / "val/law_val.csv", "id,question,A,B,C,D,answer\n0,q,a,b,c,d,A\n1,q,a\n")
    with pytest.raises(UserError, match=r"law_val.csv:3: 3 columns, 7 expected"):
        find_card("ceval").load(tmp_path, "val", "law")


def test_missing_data_name_files_and_source(tmp_path):
    with pytest.raises(
        UserError, match=r"looked for test/law_test.csv, .*it comes from https://github.com/hendrycks/test"
    ):
        find_card("mmlu").load(tmp_path, "test", "law")
    with pytest.raises(UserError, match=r"none ship with tnllm; give --data-dir DIR"):
        find_card("boolq").load(None, "validation", None)


def test_a_split_that_stands_in_is_told(tmp_path):
    write(
        tmp_path / "openbookqa_main_validation.jsonl",
        [{"question_stem": "s", **{k: ARC[k] for k in ("choices", "answerKey")}}],
    )
    assert find_card("obqa").load(tmp_path, "test", None)[1] == "validation"


def test_cards_are_complete():
    cards = load_cards()
    assert set(PAPER_TASKS) <= set(cards)
    for card in cards.values():
        assert card.rows in _DOCUMENTS
        assert (card.sample is not None) == card.sample_file.is_file()
        if card.sample:
            split = next(iter(card.files))
            documents, _, _ = card.load(None, split, next(iter(card.sample_subjects()), None))
            assert len(documents) >= 4
    # Sets that may not be shipped are represented by questions of our own, a dozen each.
    for name in ("ceval-valid", "cmmlu"):
        card = cards[name]
        assert sum(len(card.load(None, next(iter(card.files)), each)[0]) for each in card.sample_subjects()) == 12
    assert subject_card("ceval-valid_law")[1] == "law" and find_card("ceval").name == "ceval-valid"


def test_prompts_by_lines_equal_whole_prompts():
    tokenizer = Tokenizer.load(assets.tokenizer_model())
    encode = LineEncoder(tokenizer)
    assert encode.by_lines
    for text in ("", "\n", "a", "以下是\n\nA. 一 \n B.  二\t\n答案：A\n\n", "x\r\ny\n", "▁\n▁ \n"):
        assert encode(text) == encode(text) == tokenizer.encode(text)
