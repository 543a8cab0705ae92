"""Token ids of prompts that repeat most of their lines: each line is encoded once.

    encode = LineEncoder(tokenizer)
    encode(text) == tokenizer.encode(text)

A few-shot header is the same text in front of every question. Where no piece of the vocabulary spans a newline, no merge
crosses one either, so the ids of a text are those of its lines one after another; where one does, texts are encoded whole.
"""

from functools import lru_cache

from tnllm.tokenizer import Tokenizer

# Line ends, spaces around them, several scripts, the space sign: what could tell lines from a whole text.
_PROBES = (
    "a\nb",
    "\n",
    "a \n  b\n\n",
    " x\n y ",
    "答案：\nA. 二\r\n\tB",
    "\n\n \n",
    "▁\n▁a",
    "1\n2\n",
    "é\u3000\n\u3000ü",
)


class LineEncoder:
    """`tokenizer.encode`, faster on prompts with lines in common."""

    def __init__(self, tokenizer: Tokenizer, lines: int = 1 << 16) -> None:
        """`lines` are kept."""
        self._tokenizer = tokenizer
        # What stands before the newline when it starts a text: nothing, or the space some models put first.
        self._skip = 0
        newline = tokenizer.encode("\n")
        if len(newline) > 1 and tokenizer.token_bytes[newline[0]] == b" ":
            self._skip = 1
        self._following = lru_cache(lines)(self._encode_following)
        self._first = lru_cache(lines)(lambda line: tuple(tokenizer.encode(line)))
        self.by_lines = not any(b"\n" in piece and piece != b"\n" for piece in tokenizer.token_bytes) and all(
            self._by_lines(probe) == tokenizer.encode(probe) for probe in _PROBES
        )

    def _encode_following(self, line: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode("\n" + line)[self._skip :])

    def _by_lines(self, text: str) -> list[int]:
        first, *rest = text.split("\n")
        ids = list(self._first(first))
        for line in rest:
            ids += self._following(line)
        return ids

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UserError for a lone surrogate."""
        return self._by_lines(text) if self.by_lines else self._tokenizer.encode(text)
