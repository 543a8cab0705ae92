"""Perplexity of texts of any length: every token is predicted from all tokens before it.

    result = perplexity(loaded, ["Once upon a time ..."], window=2048)
    result["bits_per_byte"], result["by_position"]

Words, bytes and their perplexities are counted as lm-evaluation-harness does. With a window the same text is also scored
in independent pieces of that many tokens, as a model with a bounded context has to.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnllm.errors import UserError
from tnllm.generation.loading import LoadedModel
from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Report, Scorer
from tnllm.tokenizer import bits_per_byte


def perplexity(
    loaded: LoadedModel,
    texts: Sequence[str],
    window: int | None = None,
    batch_tokens: int | None = None,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Score each text on its own, after the begin token. `by_position` counts tokens from the start of a text.

    Raises UserError if all texts are empty.
    """
    ids = [loaded.tokenizer.encode(text) for text in texts]
    if not any(ids):
        raise UserError("there is no text to score: every document is empty")
    scorer = Scorer(loaded.model, batch_tokens=batch_tokens)

    def score(pieces: list[list[int]]) -> list[np.ndarray]:
        return scorer.in_order([Request([loaded.bos_id], piece) for piece in pieces], report)

    logprobs = score([text for text in ids if text])
    sizes = np.array([len(data) for data in loaded.tokenizer.token_bytes])
    num_bytes = [sizes[text] for text in ids if text]
    total = -float(sum(part.sum() for part in logprobs))
    result: dict[str, Any] = {
        "documents": len(logprobs),
        "tokens": sum(map(len, logprobs)),
        "words": sum(len(re.split(r"\s+", text)) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    result |= _rates(total, result)
    result["by_position"] = _by_position(logprobs, num_bytes)
    if window is not None:
        pieces = [text[start : start + window] for text in ids for start in range(0, len(text), window)]
        nats = -float(sum(part.sum() for part in score(pieces)))
        result["windows"] = {"window": window, "pieces": len(pieces), **_rates(nats, result)}
    return result


def _rates(nats: float, counts: dict[str, Any]) -> dict[str, float]:
    return {
        "token_perplexity": math.exp(nats / counts["tokens"]),
        # A text without spaces is one word, whose perplexity would overflow.
        "word_perplexity": math.exp(min(nats / counts["words"], 700.0)),
        "byte_perplexity": math.exp(nats / counts["bytes"]),
        "bits_per_byte": bits_per_byte(nats, counts["bytes"]),
    }


def _by_position(logprobs: Sequence[Any], num_bytes: Sequence[Any]) -> list[dict[str, Any]]:
    """Bits per byte of tokens 0 to 63 of their text, 64 to 127, 128 to 255 and so on, doubling."""
    rows = []
    low, high = 0, 64
    while any(len(part) > low for part in logprobs):
        nats = -float(sum(part[low:high].sum() for part in logprobs))
        size = int(sum(part[low:high].sum() for part in num_bytes))
        count = sum(len(part[low:high]) for part in logprobs)
        bits = bits_per_byte(nats, size) if size else None
        rows.append(
            {
                "from": low, "to": high - 1, "tokens": count, "token_perplexity": math.exp(nats / count),
                "bits_per_byte": bits,
            }
        )  # fmt: skip
        low, high = high, high * 2
    return rows
