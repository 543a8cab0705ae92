"""Perplexity of a text, read in one go: every token is predicted from all before it, however long the text.

    found = perplexity(ready, ["Once upon a time ..."], window=2048)
    found["bits_per_byte"], found["by_position"]

Words, bytes and their perplexities are counted as lm-evaluation-harness counts them. With a window the same text is also
scored in pieces of that many tokens that know nothing of each other, as a model of bounded context has to.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnllm.errors import UserError
from tnllm.generation.loading import Ready
from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Report, Scorer


def perplexity(
    ready: Ready,
    texts: Sequence[str],
    window: int | None = None,
    batch_tokens: int | None = None,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Score texts, each for itself after the begin token. `by_position` counts tokens from the start of their text.

    Raises UserError when there is no text.
    """
    ids = [ready.tokenizer.encode(text) for text in texts]
    if not any(ids):
        raise UserError("there is no text to score: every document is empty")
    logprobs = _score(ready, [text for text in ids if text], batch_tokens, report)
    sizes = np.array([len(data) for data in ready.tokenizer.token_bytes])
    num_bytes = [sizes[text] for text in ids if text]
    total = -float(sum(part.sum() for part in logprobs))
    found: dict[str, Any] = {
        "documents": len(logprobs),
        "tokens": sum(map(len, logprobs)),
        "words": sum(len(re.split(r"\s+", text)) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    found |= _rates(total, found)
    found["by_position"] = _by_position(logprobs, num_bytes)
    if window is not None:
        pieces = [text[start : start + window] for text in ids for start in range(0, len(text), window)]
        cut = -float(sum(part.sum() for part in _score(ready, pieces, batch_tokens, report)))
        found["windows"] = {"window": window, "pieces": len(pieces), **_rates(cut, found)}
    return found


def _score(
    ready: Ready, texts: Sequence[list[int]], batch_tokens: int | None, report: Report
) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    scorer = Scorer(ready.model, batch_tokens=batch_tokens)
    found: dict[int, Any] = {
        score.index: score.logprobs for score in scorer.score([Request([ready.bos_id], text) for text in texts], report)
    }
    return [found[index] for index in range(len(texts))]


def _rates(nats: float, counts: dict[str, Any]) -> dict[str, float]:
    return {
        "token_perplexity": math.exp(nats / counts["tokens"]),
        # Text without spaces is one word, whose perplexity is beyond any number.
        "word_perplexity": math.exp(min(nats / counts["words"], 700.0)),
        "byte_perplexity": math.exp(nats / counts["bytes"]),
        "bits_per_byte": nats / math.log(2) / counts["bytes"],
    }


def _by_position(logprobs: Sequence[Any], num_bytes: Sequence[Any]) -> list[dict[str, Any]]:
    """Bits per byte of tokens 0 to 63 of their text, 64 to 127, 128 to 255 and so on."""
    rows = []
    low, high = 0, 64
    while any(len(part) > low for part in logprobs):
        nats = -float(sum(part[low:high].sum() for part in logprobs))
        size = int(sum(part[low:high].sum() for part in num_bytes))
        count = sum(len(part[low:high]) for part in logprobs)
        bits = nats / math.log(2) / size if size else None
        rows.append(
            {
                "from": low,
                "to": high - 1,
                "tokens": count,
                "token_perplexity": math.exp(nats / count),
                "bits_per_byte": bits,
            }
        )
        low, high = high, high * 2
    return rows
