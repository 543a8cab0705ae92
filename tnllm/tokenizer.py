"""Text to token ids and back: SentencePiece models with byte fallback, trained here or released by others, and the tiktoken
vocabulary of TransNormerLLM3.

tokenizer = Tokenizer.load("run/weights")        # a .model file or a folder holding tokenizer.model
ids = tokenizer.encode("Once upon a time", eos=True)
tokenizer.decode(ids)                            # "Once upon a time"
decoder = StreamDecoder(tokenizer)               # decoder.push(id) for each id, then decoder.flush()
model = train_tokenizer(texts, vocab_size=8192)  # the bytes of a tokenizer.model

Models trained here round-trip every text: `decode(encode(text)) == text`, spaces, tabs and newlines
included. Ids follow the released models: unknown 0, begin 1, end 2, and 0 pads where a model has no padding.
"""

import base64
import binascii
import codecs
import hashlib
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from tnllm.errors import UserError, optional_import

FILE_NAME = "tokenizer.model"
# SentencePiece writes a space as this character, so the character itself must go through its bytes.
_SPACE = "\u2581"
# SentencePiece drops longer training lines (4,192 bytes); a character is at most 4 bytes.
_MAX_LINE_CHARS = 1000
_MIN_VOCAB_SIZE = 320
# The library takes some 35 times a text's size in memory.
_PART_CHARS = 1 << 20
# Texts that a normalising model changes.
_PROBE = " \uff21  \ufb01\u2460e\u0301 "
TIKTOKEN_SUFFIX = ".tiktoken"
# The vocabulary of TransNormerLLM3 (15B): cl100k's split pattern with digits standing alone, and ten control tokens above
# the ranks, with a gap.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_SPECIAL_TOKENS = {
    "<|J2PM|>": 100256,
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<s>": 100261,
    "<pad>": 100262,
    "<unk>": 100263,
    "<mask>": 100264,
    "<|endofprompt|>": 100276,
}


class Tokenizer:
    """A SentencePiece or tiktoken model. Make one with `Tokenizer.load(path)`."""

    def __init__(self, model: bytes, path: Path) -> None:
        """`model` holds the bytes of a model file; `path` names it in messages. Raises UserError."""
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = TiktokenModel(model, path) if path.suffix == TIKTOKEN_SUFFIX else _sentencepiece(model, path)
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.unk_id
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no begin (<s>) or end (</s>) token; train one with both")
        self._adds_space = False
        self._space_ids: list[int] | None = None
        if isinstance(self._processor, TiktokenModel):
            return
        # Some models (Llama's) put a space before every text; decoding takes it away again.
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE)
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = byte_ids if all(map(self._processor.is_byte, byte_ids)) else None

    def check_vocabulary(self, vocab_size: int, advice: str = "they do not belong together") -> None:
        """Raises UserError, which ends with `advice`, if there are more ids than a model's `vocab_size` embedding rows."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer {self.path} has {self.vocab_size} pieces, more than model.vocab_size {vocab_size}; {advice}"
            )

    @property
    def backend(self) -> Any:
        """The library's model behind it: a SentencePieceProcessor, or a TiktokenModel."""
        return self._processor

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Load a model file, or a folder's: `tokenizer.model`, else its one `*.tiktoken`. Raises UserError."""
        file = Path(path)
        if file.is_dir():
            found = sorted(file.glob(f"*{TIKTOKEN_SUFFIX}"))
            use_found = len(found) == 1 and not (file / FILE_NAME).is_file()
            file = found[0] if use_found else file / FILE_NAME
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}; give a {FILE_NAME} or a folder that holds one")
        return Tokenizer(file.read_bytes(), file)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, with the begin and end ids around them if asked for.

        Raises UserError for a lone surrogate, the one thing a str can hold that is no Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise UserError(f"text holds a lone surrogate ({code}) at character {error.start}") from None
        ids = (
            [id for part in self.parts(text) for id in self._encode(part)]
            if len(text) > _PART_CHARS
            else self._encode(text)
        )
        if bos:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def parts(self, text: str) -> Iterator[str]:
        """`text` in parts of a million characters, whose ids one after another are those of the text.

        They end where no token could lie across, within another million characters; the few models that change a text
        before they split it get all of it at once.
        """
        start = 0
        while len(text) - start > _PART_CHARS and (joints := self._joints) is not None:
            ends = range(start + _PART_CHARS, min(start + 2 * _PART_CHARS, len(text)))
            end = next((end for end in ends if text[end - 1 : end + 1] not in joints), ends.stop)
            yield text[start:end]
            start = end
        yield text[start:]

    @cached_property
    def _joints(self) -> frozenset[str] | None:
        """Every two neighbours in a token; None if a part's ids could depend on what is before or behind it."""
        if self._space_ids is None or self._adds_space or self.decode(self._processor.encode(_PROBE)) != _PROBE:
            return None
        pieces = (self._processor.id_to_piece(id).replace(_SPACE, " ") for id in range(self.vocab_size))
        return frozenset(piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1))

    def _encode(self, text: str) -> list[int]:
        if self._adds_space or self._space_ids is None or _SPACE not in text:
            return self._processor.encode(text)
        first, *rest = text.split(_SPACE)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids vanish, bytes that are no UTF-8 become U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        decoder = StreamDecoder(self)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def piece(self, id: int) -> str:
        """The vocabulary entry of `id` as the model spells it, such as `<0x0A>` or `\u2581the`."""
        return self._processor.id_to_piece(id)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """UTF-8 bytes of each id: `b""` for control ids, one byte for a fallback byte. Length V."""
        return tuple(self._bytes_of(id) for id in range(self.vocab_size))

    def _bytes_of(self, id: int) -> bytes:
        if isinstance(self._processor, TiktokenModel):
            return self._processor.token_bytes(id)
        piece = self._processor.id_to_piece(id)
        if self._processor.is_control(id):
            return b""
        if self._processor.is_byte(id):
            return bytes([int(piece[3:-1], 16)])
        if self._processor.is_unknown(id):
            return " \u2047 ".encode()
        return piece.replace(_SPACE, " ").encode()


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The loss that does not depend on the tokenizer, from the total of all tokens and the bytes they stand for."""
    return nats / math.log(2) / max(num_bytes, 1)


def _sentencepiece(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        # The library takes no bytes at all for a model that is yet to come.
        return sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is not a SentencePiece model; 'tnllm tokenizer train' writes one") from None


def read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Token → rank. Raises UserError for a file that is not a tiktoken vocabulary."""
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise UserError(f"{path} is not a tiktoken vocabulary (lines of a base64 token and a rank)") from None
    bytes_missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if bytes_missing or max(ranks.values()) >= min(TIKTOKEN_SPECIAL_TOKENS.values()):
        raise UserError(f"{path} is not a vocabulary of TransNormerLLM3: it needs all 256 bytes and ranks below 100256")
    return ranks


class TiktokenModel:
    """TransNormerLLM3's vocabulary behind the methods of a SentencePiece model that `Tokenizer` uses.

    A `.tiktoken` file holds lines of a base64 token and its rank, which is its id. Ids in the gap below the control
    tokens are empty.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        """Raises UserError for a bad file, MissingExtra without the library."""
        with optional_import("hf", "tiktoken"):
            import tiktoken
        self.ranks = read_ranks(data, path)
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=TIKTOKEN_PATTERN, mergeable_ranks=self.ranks, special_tokens=TIKTOKEN_SPECIAL_TOKENS
        )

    @cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id: name for name, id in TIKTOKEN_SPECIAL_TOKENS.items()}

    def vocab_size(self) -> int:
        return max(TIKTOKEN_SPECIAL_TOKENS.values()) + 1

    def unk_id(self) -> int:
        return TIKTOKEN_SPECIAL_TOKENS["<unk>"]

    def bos_id(self) -> int:
        return TIKTOKEN_SPECIAL_TOKENS["<s>"]

    def eos_id(self) -> int:
        return TIKTOKEN_SPECIAL_TOKENS["<|endoftext|>"]

    def pad_id(self) -> int:
        return TIKTOKEN_SPECIAL_TOKENS["<pad>"]

    def encode(self, text: str) -> list[int]:
        """Ids; the names of control tokens in a text are text."""
        return self._encoding.encode_ordinary(text)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of an id, empty for control tokens and gaps."""
        return self._tokens.get(id, b"")

    def id_to_piece(self, id: int) -> str:
        """For people: a control token's name, or the bytes as text."""
        return self._names.get(id) or self.token_bytes(id).decode("utf-8", "replace")


class StreamDecoder:
    """Turns ids into text one by one, never half a character; together it is `tokenizer.decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer._adds_space

    def push(self, id: int) -> str:
        """Text that became certain with `id`; empty while a character is incomplete."""
        table = self._tokenizer.token_bytes
        if not 0 <= id < len(table):
            raise UserError(f"token id {id} is outside the tokenizer's vocabulary of {len(table)}")
        data = table[id]
        if data and self._at_start:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9995,
    max_lines: int = 2_000_000,
) -> bytes:
    """Train a BPE model with byte fallback; returns the bytes of its file, the same for the same input.

    Text is taken as it is (no normalisation, no added space), digits stand alone, newline and tab are tokens,
    and runs of spaces may be. `character_coverage` is the share of character occurrences that get a token
    of their own; rarer characters are spelled in bytes. `max_lines` caps memory: of more lines a sample
    of that size is used. Raises UserError for no text or an impossible vocabulary size.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(
            f"vocabulary size is {vocab_size}; byte fallback alone needs 256: give {_MIN_VOCAB_SIZE} or more"
        )
    if not 0.98 <= character_coverage <= 1:
        raise UserError(f"character coverage is {character_coverage}; give a share from 0.98 to 1")
    if max_lines <= 100:
        raise UserError(f"max_lines is {max_lines}; a sample needs more than 100 lines")
    lines = _training_lines(texts)
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a tokenizer on: every document is empty")
    model = io.BytesIO()
    failures: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting_failures(itertools.chain([first], lines), failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            character_coverage=character_coverage,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            # The thread count is stored in the model file, so it is fixed: it does not change the vocabulary.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(_training_error(str(error), vocab_size)) from None
    return model.getvalue()


def _noting_failures(lines: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    # The trainer turns whatever the iterator raises, Ctrl-C included, into a RuntimeError of its own.
    try:
        yield from lines
    except BaseException as error:
        failures.append(error)
        raise


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    # A NUL ends a line for the trainer, and the space sign would be learned as a space.
    for text in texts:
        for line in re.split(r"[\n\0\u2581]", text):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]


def _training_error(message: str, vocab_size: int) -> str:
    if match := re.search(r"value <= (\d+)", message):
        return f"vocabulary size is {vocab_size}; this text allows at most {match[1]}: lower it or add text"
    if match := re.search(r"required_chars\.? *\(?(\d+) vs (\d+)", message):
        return (
            f"vocabulary size is {vocab_size}, but this text needs {match[2]} (characters and fixed tokens); "
            "raise it or lower the character coverage"
        )
    return f"training the tokenizer failed: {message}"
