import io
import itertools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnllm.tokenizer
from tnllm import assets
from tnllm.errors import UserError
from tnllm.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

SHIPPED = Tokenizer.load(assets.tokenizer_model())
TEXTS = [
    "Once upon a time there was a king.\n\tHe had 3 sons.",
    "从前有一个国王，他有三个儿子。",
    "def f(x):\n    return x\n",
]

# Surrogates are no text; every other code point is.
anything = st.text(st.characters(exclude_categories=["Cs"]))
spaces = st.text(st.sampled_from(" \t\n\r\u2581\u3000\u00a0ab中"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 3, 340))
    return Tokenizer.load(folder)


@given(anything | spaces)
@example("\u2581 \u2581")
@example("<s></s><unk><0x0A>\0")
@example("\ufeff\u200d👩‍👩‍👧‍👦𠀀 １２３ﬁ\u0301")
def test_any_text_survives(text):
    assert SHIPPED.decode(SHIPPED.encode(text)) == text


@given(anything | spaces)
@settings(max_examples=50)
def test_any_text_survives_a_tokenizer_trained_on_little(trained, text):
    assert trained.decode(trained.encode(text, bos=True, eos=True)) == text


@given(st.lists(st.integers(0, SHIPPED.vocab_size - 1)))
@example([SHIPPED.encode("😀")[1]] * 3)
def test_streaming_equals_decoding_and_never_shows_half_a_character(ids):
    decoder = StreamDecoder(SHIPPED)
    parts = [decoder.push(id) for id in ids] + [decoder.flush()]
    data = b"".join(SHIPPED.token_bytes[id] for id in ids)
    assert "".join(parts) == SHIPPED.decode(ids) == data.decode("utf-8", "replace")


@given(anything)
def test_streaming_valid_text_shows_only_whole_characters(text):
    decoder = StreamDecoder(SHIPPED)
    shown = "".join(decoder.push(id) for id in SHIPPED.encode(text))
    assert shown == text
    assert decoder.flush() == ""


@given(anything.filter(lambda text: "\u2581" not in text))
@settings(max_examples=50)
def test_the_library_itself_decodes_the_same(text):
    ids = SHIPPED.encode(text)
    assert SHIPPED._processor.encode(text) == ids
    assert SHIPPED._processor.decode(ids) == SHIPPED.decode(ids)


def test_a_model_that_adds_a_space_takes_it_away_again(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue(), tmp_path / "m")
    for text in ("a king", "  two", "", "国王 a"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        decoder = StreamDecoder(tokenizer)
        assert tokenizer.decode(ids) == text == tokenizer._processor.decode(ids[1:-1])
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == text


def test_ids_follow_the_released_models():
    assert (SHIPPED.unk_id, SHIPPED.bos_id, SHIPPED.eos_id, SHIPPED.pad_id) == (0, 1, 2, 0)
    assert SHIPPED.vocab_size == 8192
    assert SHIPPED.encode("a", bos=True, eos=True) == [1, *SHIPPED.encode("a"), 2]
    assert SHIPPED.decode([1, *SHIPPED.encode("a"), 2]) == "a"
    assert len(SHIPPED.sha256) == 64


def test_digits_stand_alone_and_newlines_are_tokens():
    pieces = [SHIPPED.piece(id) for id in SHIPPED.encode("2024\n\t")]
    assert pieces == ["2", "0", "2", "4", "\n", "\t"]


def test_token_bytes_count_the_text():
    text = "Hello, 世界! 😀\n"
    assert sum(len(SHIPPED.token_bytes[id]) for id in SHIPPED.encode(text, bos=True, eos=True)) == len(text.encode())


def test_training_is_deterministic_also_when_it_samples():
    texts = [f"line {i} has {i * 7919 % 104729:x} and {i * 104729 % 7919:o}" for i in range(500)]
    assert train_tokenizer(texts, 330, max_lines=200) == train_tokenizer(texts, 330, max_lines=200)
    assert train_tokenizer(texts, 330, max_lines=200) != train_tokenizer(texts, 330, max_lines=150)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text to train a tokenizer on: every document is empty"),
        (["", "\n"], {}, "no text"),
        (TEXTS, {"vocab_size": 100}, "vocabulary size is 100; byte fallback alone needs 256: give 320 or more"),
        (TEXTS, {"vocab_size": 50_000}, "vocabulary size is 50000; this text allows at most"),
        (
            [chr(0x4E00 + i) for i in range(500)],
            {"vocab_size": 400},
            "but this text needs 761 (characters and fixed tokens)",
        ),
        (TEXTS, {"max_lines": 100}, "max_lines is 100; a sample needs more than 100 lines"),
        (TEXTS, {"character_coverage": 0.5}, "character coverage is 0.5; give a share from 0.98 to 1"),
    ],
)
def test_training_says_what_is_wrong(texts, options, message):
    with pytest.raises(UserError) as error:
        train_tokenizer(texts, **{"vocab_size": 330, **options})
    assert message in str(error.value)


@pytest.mark.parametrize("failure", [UserError("web.jsonl:3: bad"), KeyboardInterrupt(), OSError(5, "input/output")])
def test_what_the_reader_raises_comes_through(failure):
    def texts():
        yield "some text"
        raise failure

    with pytest.raises(type(failure)) as error:
        train_tokenizer(texts(), 330)
    assert error.value is failure


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere; give a tokenizer.model or a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    for junk in (b"", b"junk", bytes(range(256))):
        (tmp_path / "tokenizer.model").write_bytes(junk)
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            Tokenizer.load(tmp_path)


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"lone surrogate \(U\+D800\) at character 2"):
        SHIPPED.encode("ab\ud800")
    for id in (-1, SHIPPED.vocab_size):
        with pytest.raises(UserError, match=f"token id {id} is outside the tokenizer's vocabulary of 8192"):
            SHIPPED.decode([id])


def test_a_tokenizer_larger_than_the_model_is_refused():
    SHIPPED.check_vocabulary(8192)
    with pytest.raises(UserError, match=r"has 8192 pieces, more than model\.vocab_size 8191; set it$"):
        SHIPPED.check_vocabulary(8191, advice="set it")


def test_every_byte_has_a_token():
    single = set(itertools.chain.from_iterable(data for data in SHIPPED.token_bytes if len(data) == 1))
    assert single == set(range(256))


def test_packaged_tokenizers_have_names():
    large = Tokenizer.load(assets.tokenizer_model("tnllm-64k"))
    assert large.vocab_size == 64_000 and Tokenizer.load(assets.tokenizer_model()).vocab_size == 8192
    assert assets.tokenizer_model("some/tokenizer.model") == Path("some/tokenizer.model")
    text = "The river 長江 flows\n\tdef f(x):\n        return x  # 12345 \u2581 😀"
    assert large.decode(large.encode(text)) == text
    # Bytes per token of each language: the reason to have it.
    assert len(large.encode("北京市是中华人民共和国的首都。")) <= 8


@given(st.text("ab .,\n\t0东西，。▁\U0001f600", max_size=60), st.sampled_from(["tnllm-8k", "tnllm-64k"]))
def test_the_parts_of_a_long_text_have_its_ids(text, name):
    tokenizer = Tokenizer.load(assets.tokenizer_model(name))
    whole = tokenizer.encode(text, bos=True, eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tnllm.tokenizer, "_PART_CHARS", 8)
        parts = list(tokenizer.parts(text))
        in_parts = tokenizer.encode(text, bos=True, eos=True)
    assert "".join(parts) == text and all(len(part) <= 16 for part in parts)
    # A part of twice the length found no place to end.
    assert in_parts == whole or any(len(part) == 16 for part in parts)


def test_a_long_text_is_not_given_to_the_library_at_once(monkeypatch):
    tokenizer = Tokenizer.load(assets.tokenizer_model("tnllm-8k"))
    text = "the quick brown fox, 快速的狐狸。 " * 20
    whole, given_texts = tokenizer.encode(text), []
    monkeypatch.setattr(tnllm.tokenizer, "_PART_CHARS", 50)
    monkeypatch.setattr(tokenizer, "_processor", Recorder(tokenizer._processor, given_texts))
    assert tokenizer.encode(text) == whole
    assert len(given_texts) > 5 and max(map(len, given_texts)) < 60


class Recorder:
    """A SentencePiece model that notes the texts it encodes."""

    def __init__(self, model, texts):
        self.model, self.texts = model, texts

    def encode(self, text):
        self.texts.append(text)
        return self.model.encode(text)

    def __getattr__(self, name):
        return getattr(self.model, name)
