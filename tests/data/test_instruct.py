"""Instruction files, and conversations packed into rows."""

import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnllm import assets
from tnllm.data.instruct import Conversation, encode, find_instruction_files, parse_record, read_conversations
from tnllm.data.instruct_loader import InstructLoader, fill_rows, pack
from tnllm.errors import RunError, UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.tokenizer import Tokenizer

TEMPLATE = "Human:\n{prompt}\nAssistant:\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.tokenizer_model())


@pytest.mark.parametrize(
    ("record", "system", "turns"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.", (("1 2", "3"),)),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, "", (("Say hi.", "hi"),)),
        ({"instruction": "Say hi.", "output": "hi", "id": 7}, "", (("Say hi.", "hi"),)),
        ({"prompt": "a", "response": "b"}, "", (("a", "b"),)),
        ({"prompt": "a", "completion": "b"}, "", (("a", "b"),)),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            "Be brief.",
            (("a", "b"), ("c", "d")),
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "", (("a", "b"),)),
    ],
)
def test_records(record, system, turns):
    assert parse_record(record, "f:1") == Conversation(system, turns, "f:1")


def messages(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], 'f:1: a list; expected {"instruction"'),
        ({"text": "a"}, "f:1: fields text; expected"),
        ({"instruction": "a", "output": 3}, "f:1: 'output' is a number; expected text"),
        ({"instruction": "a"}, "f:1: 'output' is missing; expected text"),
        ({"prompt": "a", "response": "\ud800"}, "f:1: 'response' holds a lone surrogate"),
        ({"messages": "hi"}, "expected a list of messages"),
        (messages("user", "robot"), "role is 'robot'; allowed: system, user"),
        (messages("user"), "roles are user; after a system message, if any, user and assistant alternate"),
        (messages("user", "user", "assistant"), "roles are user, user, assistant"),
        (messages("system"), "roles are none"),
        ({"messages": []}, "roles are none"),
    ],
)
def test_bad_records_are_named(record, message):
    with pytest.raises(UserError) as error:
        parse_record(record, "f:1")
    assert message in str(error.value) and error.value.exit_code == 2


def test_earlier_turns_and_the_system_text_are_learned_from(tokenizer):
    record = {"instruction": "And then?", "input": "", "output": "He left.", "system": "You are a monk."}
    talk = parse_record(record | {"history": [["Who came?", "A king."]]}, "f:1")
    assert talk == Conversation("You are a monk.", (("Who came?", "A king."), ("And then?", "He left.")), "f:1")
    ids, counted = encode(talk, tokenizer, TEMPLATE)
    assert tokenizer.decode(ids.tolist()).startswith("You are a monk.\nHuman:\nWho came?\nAssistant:\nA king.")
    assert "A king." in tokenizer.decode(ids[counted].tolist())
    # The instruction belongs to its own turn, not before the earlier ones.
    with_input = parse_record(record | {"input": "Here.", "history": [["a", "b"]]}, "f:1")
    assert with_input.turns[1] == ("And then?\nHere.", "He left.") and with_input.system == "You are a monk."
    assert parse_record({**record, "input": "Here."}, "f:1").turns == (("And then?\nHere.", "He left."),)
    assert parse_record({**record, "input": "Here.", "system": None, "history": None}, "f:1").system == "And then?"
    pair = {"prompt": "c", "response": "d", "system": "S", "history": [["a", "b"]]}
    assert parse_record(pair, "f:1") == Conversation("S", (("a", "b"), ("c", "d")), "f:1")


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_both_spellings_of_a_message_under_both_keys(key, role, content):
    said = [{role: "user", content: "Hi"}, {role: "assistant", content: "Hello"}]
    assert parse_record({key: said, "system": "Be brief."}, "f:1") == Conversation(
        "Be brief.", (("Hi", "Hello"),), "f:1"
    )
    same = [{role: "system", content: "Be brief."}, *said]
    assert parse_record({key: same, "system": "Be brief."}, "f:1").system == "Be brief."
    with pytest.raises(UserError, match="both a system message and a 'system' text, which differ"):
        parse_record({key: same, "system": "Be long."}, "f:1")


@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_answers_that_are_not_to_be_learned_are_not(tokenizer, flag, no, yes):
    said = [("Hi", "wrong answer", no), ("Again", "right answer", yes), ("More", "plain answer", None)]
    messages = []
    for prompt, answer, value in said:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, flag: value}]
    talk = parse_record({"messages": messages}, "f:1")
    ids, counted = encode(talk, tokenizer, TEMPLATE)
    end = [tokenizer.eos_id]
    assert ids[counted].tolist() == tokenizer.encode("right answer") + end + tokenizer.encode("plain answer") + end
    assert "wrong answer" in tokenizer.decode(ids[~counted].tolist())
    alone = parse_record({"messages": messages[:2]}, "f:1")
    whole = parse_record({"prompt": "a", "response": "b", flag: no}, "f:1")
    assert pack([talk, alone, whole], tokenizer, TEMPLATE, 64).dropped == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": 0.5}, "'weight' is 0.5; an answer is learned or not: 0 or 1"),
        ({"loss": "yes"}, "'loss' is 'yes'"),
        ({"tools": [{"name": "f"}]}, "the key 'tools' changes what is learned and is not supported"),
        ({"mask": False}, "the key 'mask' changes what is learned"),
        ({"images": ["a.png"]}, "the key 'images'"),
        ({"tool_calls": [1]}, "the key 'tool_calls'"),
        ({"rejected_response": "c"}, "the key 'rejected_response'"),
        ({"chosen_score": 1.0}, "the key 'chosen_score'"),
        ({"label": False}, "the key 'label'"),
        ({"kto_tag": True}, "the key 'kto_tag'"),
    ],
)
def test_what_cannot_be_learned_as_asked_is_refused_by_name(more, message):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for record in ({"prompt": "a", "response": "b", **more}, {"messages": [said[0], {**said[1], **more}]}):
        with pytest.raises(UserError) as error:
            parse_record(record, "f:1")
        assert message in str(error.value)


def test_a_call_of_a_tool_without_text_is_named():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [1]}]
    with pytest.raises(UserError, match="the key 'tool_calls' changes what is learned"):
        parse_record({"messages": said}, "f:1")


def test_only_answers_are_learned():
    said = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="a message of 'user' asks to be learned; only answers are"):
        parse_record({"messages": said}, "f:1")
    with pytest.raises(UserError, match=r"'history' must be a list of \[prompt, answer\]"):
        parse_record({"prompt": "a", "response": "b", "history": [["a"]]}, "f:1")


def test_keys_that_are_not_read_are_named_once(tmp_path, capsys):
    record = {"messages": messages("user", "assistant")["messages"], "id": 1, "reward": 2}
    record["messages"][1]["thinking"] = "x"
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 3)
    assert len(list(read_conversations(find_instruction_files(tmp_path)))) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"the key {key!r} is not read, here and in what follows" for key in ("thinking", "reward")
    ]


def test_instruction_files_in_linked_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.json").write_text("[]")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in find_instruction_files(tmp_path / "in")] == ["a.json"]


def test_files(tmp_path):
    pair = {"instruction": "Hé?", "output": "b"}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([pair, pair], indent=1), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(pair) + "\n\n" + json.dumps(pair) + "\r\n")
    (tmp_path / "notes.txt").write_text("no")
    files = find_instruction_files(tmp_path)
    assert [file.name for file in files] == ["a.json", "b.jsonl.gz"]
    conversations = list(read_conversations(files))
    assert {c.turns for c in conversations} == {(("Hé?", "b"),)}
    where = [c.where.removeprefix(str(tmp_path)) for c in conversations]
    assert where == ["/a.json, record 1", "/a.json, record 2", "/b.jsonl.gz:1", "/b.jsonl.gz:3"]


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"\n', UserError, "a.jsonl:1: invalid JSON"),
        ("a.json", b'[{"prompt": "a"', UserError, "is not a complete JSON array"),
        ("a.jsonl", b"\xff\xfe", UserError, "is not UTF-8 (byte 1)"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}', mtime=0)[:-9],
            RunError,
            "is cut short or damaged",
        ),
        ("a.jsonl.gz", b"no gzip at all", RunError, "is cut short or damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error) as raised:
        list(read_conversations([tmp_path / name]))
    assert message in str(raised.value) and name in str(raised.value)


def test_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for path, message in (
        (tmp_path / "b", "no such file"),
        (tmp_path / "a.txt", "is not an instruction file"),
        (tmp_path, "no inst"),
    ):
        with pytest.raises(UserError, match=message):
            find_instruction_files(path)


def test_answers_and_end_tokens_are_learned(tokenizer):
    talk = Conversation("Be brief.", (("Who?", "Me."), ("Why?", "So.")))
    ids, counted = encode(talk, tokenizer, TEMPLATE)
    end = [tokenizer.eos_id]
    asked = [tokenizer.encode("Be brief.\nHuman:\nWho?\nAssistant:\n"), tokenizer.encode("Human:\nWhy?\nAssistant:\n")]
    said = [tokenizer.encode("Me.") + end, tokenizer.encode("So.") + end]
    assert ids.tolist() == asked[0] + said[0] + asked[1] + said[1]
    assert ids[counted].tolist() == said[0] + said[1]


def test_a_template_holds_the_prompt_once(tokenizer):
    for template in ("Human:", "{prompt}{prompt}"):
        with pytest.raises(UserError, match=r"it must hold \{prompt\} once"):
            encode(Conversation("", (("a", "b"),)), tokenizer, template)


@given(st.integers(1, 40).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=60))))
def test_rows_hold_everything_once_and_nothing_too_much(case):
    seq_len, lengths = case
    rows = fill_rows(lengths, seq_len)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= seq_len for row in rows)
    # No two rows would fit into one.
    sums = sorted(sum(lengths[item] for item in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > seq_len


def talks(count: int) -> list[Conversation]:
    return [Conversation("", ((f"Question {i * i}?", f"Answer {'and more ' * (i % 5)}{i}."),)) for i in range(count)]


def test_packed_equals_one_by_one(tokenizer):
    """The loss of packed rows is the sum of the conversations' own losses: none sees another, none is lost."""
    packed = pack(talks(9), tokenizer, TEMPLATE, seq_len=96)
    loader = InstructLoader(packed, batch_size=1, shuffle=False)
    model = build_model(get_preset("tiny", num_layers=2), seed=0)
    batch = loader.batch(0, loader.num_rows + 1)  # one row of padding at the end
    assert batch.tokens.shape == (1, 96 * (loader.num_rows + 1)) and batch.cu_seqlens[-1] == batch.tokens.numel()
    together = model.loss(batch.tokens, batch.labels, batch.cu_seqlens)
    alone, labels, num_bytes = 0.0, 0, 0
    for talk in talks(9):
        ids, counted = encode(talk, tokenizer, TEMPLATE)
        target = torch.from_numpy(np.where(counted, ids, -100)[1:])[None]
        alone += model.loss(torch.from_numpy(ids[:-1])[None], target).item()
        labels += int((target != -100).sum())
        num_bytes += len(talk.turns[0][1].encode())
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)
    assert (batch.num_labels, batch.num_bytes, loader.num_labels) == (labels, num_bytes, labels)


def test_batches_are_a_function_of_seed_and_sample(tokenizer):
    packed = pack(talks(40), tokenizer, TEMPLATE, seq_len=64)
    loader = InstructLoader(packed, batch_size=8, seed=3)
    rows = loader.num_rows
    whole = loader.batch(5, 4).tokens.reshape(4, -1)
    parts = [InstructLoader(packed, batch_size=8, seed=3).batch(5 + i, 1).tokens[0] for i in range(4)]
    assert torch.equal(whole, torch.stack(parts))
    for epoch in (0, 1):
        seen = sorted(loader.batch(epoch * rows + i, 1).tokens.tolist() for i in range(rows))
        assert seen == sorted(loader.batch(i, 1).tokens.tolist() for i in range(rows))
    order = [[loader._items(epoch * rows + i) for i in range(rows)] for epoch in (0, 1)]
    assert order[0] != order[1]
    assert len({len(loader.batch(i, 2).cu_seqlens) for i in range(rows)}) == 1


def test_ranks_share_a_step(tokenizer):
    packed = pack(talks(10), tokenizer, TEMPLATE, seq_len=64)
    ranges = [InstructLoader(packed, 6, rank=rank, world_size=2).rank_samples(12) for rank in (0, 1)]
    assert [list(part) for part in ranges] == [[12, 13, 14], [15, 16, 17]]
    with pytest.raises(UserError, match="7 rows a step do not divide over 2 ranks"):
        InstructLoader(packed, 7, world_size=2)


def test_what_is_too_long_or_empty_is_counted(tokenizer):
    long = Conversation("", (("Say much.", "word " * 200),))
    hopeless = Conversation("", (("word " * 200, "yes"),))
    packed = pack([*talks(3), long, hopeless, Conversation("", (("a", " "),))], tokenizer, TEMPLATE, seq_len=64)
    assert (len(packed.ids), packed.cut, packed.dropped) == (4, 1, 2)
    assert max(map(len, packed.ids)) == 65
    with pytest.raises(UserError, match=r"none of 1 conversations has an answer within data.seq_len 64"):
        pack([hopeless], tokenizer, TEMPLATE, seq_len=64)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(10, 0.1, 1), (10, 0.0, 0), (3, 0.01, 1), (1, 0.5, 0), (9, 0.99, 8)]
)
def test_the_validation_split(tokenizer, count, fraction, held):
    train, validation = pack(talks(count), tokenizer, TEMPLATE, seq_len=64).split(fraction)
    assert (len(train.ids), len(validation.ids)) == (count - held, held)
    assert len({ids.tobytes() for ids in train.ids + validation.ids}) == count


def test_the_conversations_that_ship(tokenizer):
    found = list(read_conversations([assets.sample_instructions()]))
    assert len(found) == 66 and len({c.turns for c in found}) == 66
    assert pack(found, tokenizer, TEMPLATE, 128).dropped == 0
