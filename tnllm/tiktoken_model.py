"""The tiktoken vocabulary of TransNormerLLM3 (15B), behind the methods of a SentencePiece model that `Tokenizer` uses.

    model = TiktokenModel(path.read_bytes(), path)
    model.encode("Once upon a time")
    model.token_bytes(262)

A `.tiktoken` file holds lines of a base64 token and its rank, which is its id. The split pattern and the control tokens
are those of the release: the pattern of cl100k with digits standing alone, and ten tokens above the ranks, with a gap.
"""

import base64
import binascii
from functools import cached_property
from pathlib import Path

from tnllm.errors import MissingExtra, UserError

SUFFIX = ".tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = {
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


def read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Token → rank. Raises UserError for a file that is no tiktoken vocabulary."""
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise UserError(f"{path} is not a tiktoken vocabulary (lines of a base64 token and a rank)") from None
    bytes_missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if bytes_missing or max(ranks.values()) >= min(SPECIAL_TOKENS.values()):
        raise UserError(f"{path} is not a vocabulary of TransNormerLLM3: it needs all 256 bytes and ranks below 100256")
    return ranks


class TiktokenModel:
    """Encodes with the tiktoken library; ids between the control tokens are empty."""

    def __init__(self, data: bytes, path: Path) -> None:
        """Raises UserError for a bad file, MissingExtra without the library."""
        try:
            import tiktoken
        except ImportError:
            raise MissingExtra("hf", "tiktoken") from None
        self.ranks = read_ranks(data, path)
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=SPECIAL_TOKENS
        )

    @cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id: name for name, id in SPECIAL_TOKENS.items()}

    def vocab_size(self) -> int:
        return max(SPECIAL_TOKENS.values()) + 1

    def unk_id(self) -> int:
        return SPECIAL_TOKENS["<unk>"]

    def bos_id(self) -> int:
        return SPECIAL_TOKENS["<s>"]

    def eos_id(self) -> int:
        return SPECIAL_TOKENS["<|endoftext|>"]

    def pad_id(self) -> int:
        return SPECIAL_TOKENS["<pad>"]

    def encode(self, text: str) -> list[int]:
        """Ids; the names of control tokens in a text are text."""
        return self._encoding.encode_ordinary(text)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of an id, empty for control tokens and gaps."""
        return self._tokens.get(id, b"")

    def id_to_piece(self, id: int) -> str:
        """For people: a control token's name, or the bytes as text."""
        return self._names.get(id) or self.token_bytes(id).decode("utf-8", "replace")
