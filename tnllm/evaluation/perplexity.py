"""Perplexity of texts of any length: every token is predicted from all tokens before it.

    result = perplexity(loaded, ["Once upon a time ..."], window=2048)
    result["bits_per_byte"], result["by_position"]

Words, bytes and their perplexities are counted as lm-evaluation-harness does. With a window the same text is also scored
in independent pieces of that many tokens, as a model with a bounded context has to. One text is in memory at a time.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from tnllm.errors import UserError
from tnllm.generation.documents import score_documents, token_parts
from tnllm.generation.loading import LoadedModel
from tnllm.generation.scoring import Scorer
from tnllm.tokenizer import bits_per_byte

# Ranges of positions that `by_position` can tell apart.
_RANGES = 48


def perplexity(
    loaded: LoadedModel,
    texts: Iterable[str],
    window: int | None = None,
    batch_tokens: int | None = None,
    report: Callable[[int, int], None] = lambda tokens, num_bytes: None,
) -> dict[str, Any]:
    """Score each text on its own, after the begin token. `by_position` counts tokens from the start of a text.

    `texts` is read a second time if there is a window. `report` gets the tokens scored so far and their bytes. Raises
    UserError if all texts are empty.
    """
    scorer = Scorer(loaded.model, batch_tokens=batch_tokens)
    sizes = np.array([len(data) for data in loaded.tokenizer.token_bytes])
    counts = {"documents": 0, "tokens": 0, "words": 0, "bytes": 0}
    begin = [loaded.bos_id]

    def documents() -> Iterator[Iterable[list[int]]]:
        for text in texts:
            counts["documents"] += bool(text)
            counts["words"] += 1 + sum(1 for _ in re.finditer(r"\s+", text))
            counts["bytes"] += len(text.encode())
            yield chain([begin], token_parts(loaded.tokenizer, text))

    # Nats, bytes and tokens of each range of positions.
    sums = np.zeros((3, _RANGES))
    for part in score_documents(scorer, documents()):
        at = np.frexp(np.arange(part.start, part.start + len(part.ids)) >> 6)[1]
        for row, values in enumerate((-part.logprobs, sizes[part.ids], np.ones(len(part.ids)))):
            sums[row] += np.bincount(at, values, _RANGES)
        counts["tokens"] += len(part.ids)
        report(counts["tokens"], int(sums[1].sum()))
    if not counts["tokens"]:
        raise UserError("there is no text to score: every document is empty")
    result: dict[str, Any] = {**counts, **_rates(float(sums[0].sum()), counts)}
    result["by_position"] = [_at_range(number, *column) for number, column in enumerate(sums.T.tolist()) if column[2]]
    if window is not None:
        pieces = ([begin, ids] for text in texts for ids in _pieces(token_parts(loaded.tokenizer, text), window))
        nats, done, last, done_bytes = 0.0, counts["tokens"], -1, int(sums[1].sum())
        for part in score_documents(scorer, pieces):
            nats, done, last = nats - float(part.logprobs.sum()), done + len(part.ids), part.document
            done_bytes += int(sizes[part.ids].sum())
            report(done, done_bytes)
        result["windows"] = {"window": window, "pieces": last + 1, **_rates(nats, counts)}
    return result


def _pieces(parts: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """The ids of a text in pieces of `size`, the last one perhaps shorter."""
    left: list[int] = []
    for part in parts:
        left += part
        whole = len(left) - len(left) % size
        yield from (left[start : start + size] for start in range(0, whole, size))
        left = left[whole:]
    if left:
        yield left


def _rates(nats: float, counts: dict[str, int]) -> dict[str, float]:
    return {
        "token_perplexity": math.exp(nats / counts["tokens"]),
        # A text without spaces is one word, whose perplexity would overflow.
        "word_perplexity": math.exp(min(nats / counts["words"], 700.0)),
        "byte_perplexity": math.exp(nats / counts["bytes"]),
        "bits_per_byte": bits_per_byte(nats, counts["bytes"]),
    }


def _at_range(number: int, nats: float, num_bytes: float, tokens: float) -> dict[str, Any]:
    """Bits per byte of tokens 0 to 63 of their text (range 0), 64 to 127, 128 to 255 and so on, doubling."""
    return {
        "from": 64 << (number - 1) if number else 0, "to": (64 << number) - 1, "tokens": int(tokens),
        "token_perplexity": math.exp(nats / tokens),
        "bits_per_byte": bits_per_byte(nats, int(num_bytes)) if num_bytes else None,
    }  # fmt: skip
