"""scripts/demo_chat.py writes conversations that fine-tuning reads, with every blank of its sentences filled."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch

from tnllm import assets
from tnllm.data.instruct import read_conversations
from tnllm.generation.loading import load
from tnllm.training.config import load_recipe

SCRIPT = Path(__file__).parent.parent / "scripts" / "demo_chat.py"
MAKERS = ("fact", "sum_of_two", "story", "verse", "memory", "follow_up", "chinese", "several")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("demo_chat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_talk_can_be_trained_on(script, tmp_path):
    talks = [getattr(script, maker)(random.Random(seed)) for maker in MAKERS for seed in range(100)]
    texts = [text for talk in talks for pair in talk for text in pair]
    assert all(text and not set("{}|") & set(text) for text in texts)
    records = [
        {
            "messages": [
                {"role": role, "content": text}
                for pair in talk
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for talk in talks
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    read = list(read_conversations([file]))
    assert len(read) == len(talks) and all(conversation.has_answer for conversation in read)


def test_sentences_are_filled_with_articles_and_capitals(script):
    values = {"who": "owl", "friend": "fox"}
    assert (
        script.fill("{An who} met {an friend}. {Friend} and {who} sang.", **values)
        == "An owl met a fox. Fox and owl sang."
    )


def test_sums_are_right(script):
    for seed in range(200):
        ((_, answer),) = script.sum_of_two(random.Random(seed))
        numbers = {name: number for number, name in enumerate(script.items("numbers"))}
        words = answer.rstrip(".").lower().split()
        a, b, result = (numbers.get(words[i]) if words[i] in numbers else int(words[i]) for i in (0, 2, 4))
        assert result == {"plus": a + b, "minus": a - b, "times": a * b}[words[1]], answer


def test_wordnet_lines_become_definitions(script, tmp_path):
    sense = "dog%1:05:00:: 00000001 1 42\ndog%2:38:00:: 00000002 1 2\nparis%1:15:00:: 00000003 1 9\n"
    (tmp_path / "index.sense").write_text(sense)
    gloss = 'a member of the genus Canis (a kind); "the dog barked all night long"'
    data = f"  1 a licence\n00000001 05 n 01 dog 0 000 | {gloss}\n"
    (tmp_path / "data.noun").write_text(data + "00000003 15 n 01 Paris 0 000 | the capital of France\n")
    (tmp_path / "index.noun").write_text("dog n 1 1 @ 1 1 00000001\nparis n 1 1 @ 1 1 00000003\n")
    (tmp_path / "data.verb").write_text("00000002 38 v 01 dog 0 000 | go after with the intent to catch\n")
    (tmp_path / "index.verb").write_text("dog v 1 1 @ 1 1 00000002\n")
    for name in ("data.adj", "index.adj"):
        (tmp_path / name).write_text("")
    talks = list(script.definitions(tmp_path, {"dog": 9, "paris": 9}, random.Random(0)))
    assert [talk[0][1] for talk in talks] == ["A dog is a member of the genus Canis.", "The dog barked all night long."]


def test_the_packaged_model_is_small_linear_and_answers_in_a_sentence():
    folder = assets.demo_weights()
    assert (folder / "model.safetensors").stat().st_size <= 21e6
    loaded = load(None, "cpu", "float32")
    assert loaded.model.config == load_recipe("demo").model and loaded.model.config.num_softmax == 0
    assert loaded.is_chat_tuned
    prompt = loaded.chat_template.format(prompt="What is the capital of France?")
    ids = loaded.tokenizer.encode(prompt)
    state, answer = None, []
    with torch.no_grad():
        # The answer is far more likely than any other at each step.
        while len(answer) < 20 and (not answer or answer[-1] != loaded.tokenizer.eos_id):
            logits, state = loaded.model(torch.tensor([answer[-1:] or ids]), state)
            answer.append(int(logits[0, -1].argmax()))
    assert loaded.tokenizer.decode(answer[:-1]) == "The capital of France is Paris."
