"""Prompts to token ids: each line is encoded once, and a prompt is split into context and continuation.

    encode = LineEncoder(tokenizer)
    encode(text) == tokenizer.encode(text)
    requests = encode_pairs([("The capital is", " Paris")], encode, tokenizer.bos_id)

All questions of a task start with the same few-shot header. If no piece of the vocabulary contains a newline and another
character, no merge crosses a newline, so the ids of a text are those of its lines concatenated. Otherwise complete texts
are encoded.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

from tnllm.generation.prefix_tree import Request
from tnllm.tokenizer import Tokenizer

_CACHED_LINES = 1 << 16
# Texts on which encoding by lines may differ: line ends, spaces around them, several scripts, U+2581.
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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some models put a space before every text, which the lines after the first must not have.
        newline = tokenizer.encode("\n")
        self._skip = int(len(newline) > 1 and tokenizer.token_bytes[newline[0]] == b" ")
        self._following = lru_cache(_CACHED_LINES)(lambda line: tuple(tokenizer.encode("\n" + line)[self._skip :]))
        self._first = lru_cache(_CACHED_LINES)(lambda line: tuple(tokenizer.encode(line)))
        self.by_lines = not any(b"\n" in piece and piece != b"\n" for piece in tokenizer.token_bytes) and all(
            self._by_lines(probe) == tokenizer.encode(probe) for probe in _PROBES
        )

    def _by_lines(self, text: str) -> list[int]:
        first, *rest = text.split("\n")
        ids = list(self._first(first))
        for line in rest:
            ids += self._following(line)
        return ids

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UserError for a lone surrogate."""
        return self._by_lines(text) if self.by_lines else self._tokenizer.encode(text)


def encode_pairs(pairs: Iterable[tuple[str, str]], encode: Callable[[str], list[int]], prefix_id: int) -> list[Request]:
    """Split as the harness does: context and continuation are encoded together and cut at the length of the context.

    `prefix_id` is the context of a continuation that has none.
    """
    contexts: dict[str, list[int]] = {}
    requests = []
    for context, continuation in pairs:
        # Spaces at the end of a context belong to the continuation's first word.
        stripped = context.rstrip()
        if stripped not in contexts:
            contexts[stripped] = encode(stripped) if stripped else [prefix_id]
        before = contexts[stripped]
        ids = encode(context + continuation)
        after = ids[len(before) :] if stripped else [id for id in ids if id != prefix_id]
        if not after:
            # Together they are no longer than the context alone, so the last token depends on the continuation.
            before, after = ids[:-1] or [prefix_id], ids[-1:]
        requests.append(Request(before, after))
    return requests
