"""One conversation has one form: training, generate, serve, eval and the exported tokenizer give the same token ids."""

import io
import json
import shutil

import httpx
import pytest
import sentencepiece

from tests.convert import official_files
from tests.serving.serving import running
from tnllm import assets
from tnllm.chat_template import (
    DEFAULT,
    encode,
    from_marked,
    render,
    stop_strings,
    to_marked,
)
from tnllm.convert.fast_tokenizer import tokenizer_files
from tnllm.convert.run import Options, convert
from tnllm.data import instruct
from tnllm.errors import UserError
from tnllm.evaluation.harness import TransNormerLM
from tnllm.generation import conversation
from tnllm.generation.loading import load
from tnllm.serving.middleware import Settings
from tnllm.tokenizer import Tokenizer

SYSTEM = " You are a monk.\n今天 </s>"
PROMPTS = ("Who came </s><s>?", "  \n你好，世界。\n\n ", "Why <unk>? \ufdd0 \U000f0000")
TEMPLATES = (DEFAULT, "<{prompt}>", "Q: {prompt} A: ", "{prompt}")


def exported(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def shown(segments):
    return "".join(segment.text + "</s>" * segment.eos for segment in from_marked(to_marked(segments)))


def as_dicts(messages):
    return [{"role": role, "content": text} for role, text in messages]


def ids_of_exported(tokenizer, messages):
    return list(tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False))


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_five_users_make_the_same_ids(tmp_path, monkeypatch, template, add_bos):
    # The demo model's answers are text; those of random weights are not.
    shutil.copytree(assets.demo_weights(), tmp_path / "weights")
    settings = {"chat_template": template, "add_bos_token": add_bos, "max_new_tokens": 6}
    (tmp_path / "weights/generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load(tmp_path / "weights", device="cpu")
    eos_id = loaded.tokenizer.eos_id

    # generate --chat: the answers are the model's, so this comes first.
    read_ids, real_read = [], conversation.read
    monkeypatch.setattr(conversation, "read", lambda *args: read_ids.extend(args[1][0]) or real_read(*args))
    talk = conversation.Conversation(loaded, loaded.params(temperature=0), template, system=SYSTEM)
    messages = [("system", SYSTEM)]
    for prompt in PROMPTS:
        *_, result = talk.ask(prompt)
        messages += [("user", prompt), ("assistant", result.text)]
    talk.context()
    prompt_ids = loaded.at_start(conversation.part_ids(loaded, messages[:-1], awaits_answer=False, is_last=True)[0])
    complete = [*prompt_ids, *loaded.tokenizer.encode(messages[-1][1]), eos_id]
    assert read_ids == complete and complete.count(eos_id) == len(PROMPTS)

    turns = tuple((messages[index][1], messages[index + 1][1]) for index in range(1, len(messages), 2))
    trained, learned = instruct.encode(instruct.Conversation(SYSTEM, turns), loaded.tokenizer, template)
    # The begin token is the model's, not the conversation's.
    begin = [loaded.bos_id] if add_bos else []
    assert begin + trained.tolist() == complete
    assert (trained[learned] == eos_id).sum() == len(PROMPTS)

    lm = TransNormerLM(loaded)
    assert lm.tok_encode(lm.apply_chat_template(as_dicts(messages[:-1]))) == prompt_ids
    assert lm.tok_encode(lm.apply_chat_template(as_dicts(messages))) == complete

    with running(loaded, Settings(name="small"), num_slots=1) as (address, engine):
        submitted, real_submit = [], engine.submit_all

        def submit_all(prompts, *args, **more):
            submitted.extend(prompts)
            return real_submit(prompts, *args, **more)

        monkeypatch.setattr(engine, "submit_all", submit_all)
        body = {"messages": as_dicts(messages[:-1]), "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    assert submitted == [prompt_ids]

    convert(tmp_path / "weights", tmp_path / "hf", Options(to="hf", verify=False), lambda _: None, lambda *_: None)
    tokenizer = exported(tmp_path / "hf")
    assert ids_of_exported(tokenizer, messages[:-1]) == prompt_ids
    assert ids_of_exported(tokenizer, messages) == complete
    # What it writes, it reads back the same.
    tokenizer.save_pretrained(tmp_path / "again")
    assert ids_of_exported(exported(tmp_path / "again"), messages) == complete
    assert tokenizer("a </s>", add_special_tokens=False).input_ids[-1] == eos_id


def tokenizer_with_space(path):
    """A tokenizer that puts a space before every text, as Llama's does."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The quick brown fox: Who came? A monk.", "今天天气很好。"] * 20), model_writer=file,
        model_type="bpe", vocab_size=340, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(file.getvalue())
    return Tokenizer.load(path)


@pytest.mark.parametrize("kind", ["tiktoken", "space"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_other_tokenizers_are_exported_with_the_same_form(tmp_path, kind, template):
    if kind == "tiktoken":
        official_files.write_tiktoken(tmp_path / "v3.tiktoken")
        tokenizer = Tokenizer.load(tmp_path / "v3.tiktoken")
    else:
        tokenizer = tokenizer_with_space(tmp_path / "tokenizer.model")
    files, notes = tokenizer_files(tokenizer, {"chat_template": template})
    assert not notes
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    messages = [("system", SYSTEM)]
    for prompt in PROMPTS:
        messages += [("user", prompt + tokenizer.piece(tokenizer.eos_id)), ("assistant", f"{prompt}</s>\n")]
    messages += [("user", "Go."), ("assistant", "")]
    expected = encode(render(template, messages), tokenizer.encode, tokenizer.eos_id)
    assert ids_of_exported(exported(tmp_path), messages) == expected
    assert expected.count(tokenizer.eos_id) == len(PROMPTS) + 1


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # What stands between two answers is one prompt: system texts first, then the users'.
        ([("user", "a"), ("user", "b")], "Human:\na\nb\nAssistant:\n"),
        ([("user", "a"), ("system", "S"), ("user", "b")], "S\nHuman:\na\nb\nAssistant:\n"),
        ([("system", "S"), ("developer", "D"), ("user", "a")], "S\nD\nHuman:\na\nAssistant:\n"),
        (
            [("user", "a"), ("assistant", "x"), ("system", "S"), ("user", "b")],
            "Human:\na\nAssistant:\nx</s>S\nHuman:\nb\nAssistant:\n",
        ),
        ([("user", "a"), ("assistant", "x"), ("system", "S")],
         "Human:\na\nAssistant:\nx</s>S\nHuman:\n\nAssistant:\n"),
        ([("system", "S")], "S\nHuman:\n\nAssistant:\n"),
        ([("assistant", "x"), ("user", "a")], "Human:\n\nAssistant:\nx</s>Human:\na\nAssistant:\n"),
        (
            [("user", "a"), ("assistant", "x"), ("assistant", "y")],
            "Human:\na\nAssistant:\nx</s>Human:\n\nAssistant:\ny</s>",
        ),
    ],
)  # fmt: skip
def test_any_order_has_a_form_and_exported_templates_have_the_same(exported_demo, messages, expected):
    assert exported_demo.apply_chat_template(as_dicts(messages), tokenize=False) == expected
    assert shown(render(DEFAULT, messages)) == expected


@pytest.fixture(scope="module")
def exported_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    files, _ = tokenizer_files(Tokenizer.load(assets.tokenizer_model()), {})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return exported(folder)


def test_exported_templates_refuse_what_serve_refuses(exported_demo):
    messages = [("user", "x"), ("tool", "y")]
    with pytest.raises(Exception, match="is of role tool; allowed: system, developer, user, assistant"):
        ids_of_exported(exported_demo, messages)
    with pytest.raises(UserError, match="message 1 is of role 'tool'; allowed: system, developer, user, assistant"):
        render(DEFAULT, messages)
    assert render(DEFAULT, []) == []


def test_exported_templates_take_parts(exported_demo):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert exported_demo.apply_chat_template(parts, tokenize=False) == "Human:\nab\nAssistant:\n"
    # A conversation that does not need marks has none.
    plain = [("system", "A"), ("user", "B"), ("assistant", "C"), ("user", "D")]
    text = exported_demo.apply_chat_template(as_dicts(plain), tokenize=False)
    assert text == "A\nHuman:\nB\nAssistant:\nC</s>Human:\nD\nAssistant:\n"


def test_marks_carry_any_text():
    texts = ["", "a</s>", "\ufdd0\ufdd1\ufdd2", "\ufdd2\ufdd2x", "\n 今"]
    messages = [(("user", "assistant")[index % 2], text) for index, text in enumerate(texts * 2)]
    for template in TEMPLATES:
        segments = render(template, messages)
        assert from_marked(to_marked(segments)) == segments
        opened = render(template, messages, open_answer=True)
        marked = to_marked(opened)
        assert from_marked(marked + " more")[-1].text == (
            opened[-1].text + " more" if opened[-1].is_answer else " more"
        )
    assert from_marked("plain </s>") == [("plain </s>", True, False)]
    assert shown(render(DEFAULT, [("user", "a"), ("assistant", "b")])) == ("Human:\na\nAssistant:\nb</s>")


def test_templates_hold_the_prompt_once():
    for template in ("Human:", "{prompt}{prompt}"):
        with pytest.raises(UserError, match=r"it must hold \{prompt\} once"):
            render(template, [("user", "x")])
    assert stop_strings(DEFAULT) == ("\nHuman:",) and stop_strings("{prompt}>") == ()
