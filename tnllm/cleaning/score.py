"""Log-likelihood of documents under a model: nats, bits per byte and perplexity of each, its state of constant size.

    ready = load("runs/tiny")
    for score in score_texts(ready.model, ready.tokenizer, texts):
        score.bits_per_byte, score.perplexity

Each token of a document from the second to the end token is predicted from all tokens before it; documents do not see
each other.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Scorer
from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer, bits_per_byte


@dataclass(frozen=True)
class Score:
    """Total `nats` of `tokens` predicted tokens, which stand for `num_bytes` bytes of text."""

    tokens: int
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The value that selection compares: it does not depend on the tokenizer."""
        return bits_per_byte(self.nats, self.num_bytes)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token; infinity if that overflows."""
        mean = self.nats / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf


def score_texts(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str], batch_tokens: int | None = None
) -> Iterator[Score]:
    """The score of every text, in order; `batch_tokens` are computed together (None: by device).

    Raises UserError for text with lone surrogates, RunError if the model gives non-finite logits.
    """
    scorer = Scorer(model, share=False, batch_tokens=batch_tokens)
    sizes = np.array([len(data) for data in tokenizer.token_bytes])
    batch: list[list[int]] = []
    num_tokens = 0
    for text in texts:
        ids = tokenizer.encode(text, eos=True)
        if batch and num_tokens + len(ids) > scorer.batch_tokens:
            yield from _scores(scorer, batch, sizes)
            batch, num_tokens = [], 0
        batch.append(ids)
        num_tokens += len(ids)
    yield from _scores(scorer, batch, sizes)


def _scores(scorer: Scorer, documents: list[list[int]], sizes: np.ndarray) -> Iterator[Score]:
    # The end token of an empty document has nothing before it.
    logprobs = iter(scorer.in_order([Request(ids[:1], ids[1:]) for ids in documents if len(ids) > 1]))
    for ids in documents:
        nats = -float(next(logprobs).sum()) if len(ids) > 1 else 0.0
        yield Score(len(ids) - 1, nats, int(sizes[ids[1:]].sum()))
