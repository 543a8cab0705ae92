"""Log-probabilities of the tokens of documents, of which a part is in memory at a time, however long they are.

for part in score_documents(Scorer(model), (token_parts(tokenizer, text, eos=True) for text in texts)):
    part.document, part.start, part.ids, part.logprobs      # one or more parts a document, in order

Each token of a document but the first is predicted from all tokens before it; documents do not see each other. Short
documents are computed together.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Scorer
from tnllm.tokenizer import Tokenizer


class Part(NamedTuple):
    """Consecutive predicted tokens of the document with this number; the first of them is predicted token `start`."""

    document: int
    start: int
    ids: NDArray[np.int64]  # [N]
    logprobs: NDArray[np.float64]  # [N], natural logarithm


def token_parts(tokenizer: Tokenizer, text: str, eos: bool = False) -> Iterator[list[int]]:
    """The ids of a text, those of a million characters or so at a time. Raises UserError for a lone surrogate."""
    yield from map(tokenizer.encode, tokenizer.parts(text))
    if eos:
        yield [tokenizer.eos_id]


def score_documents(scorer: Scorer, documents: Iterable[Iterable[Sequence[int]]]) -> Iterator[Part]:
    """Score documents given as token ids in parts; one of fewer than two tokens has a Part without tokens.

    Raises what `Scorer.score` raises.
    """
    batch: list[list[int]] = []
    first = size = 0
    for number, document in enumerate(documents):
        parts, ids = iter(document), list[int]()
        while len(ids) <= scorer.batch_tokens and (part := next(parts, None)) is not None:
            ids += part
        if size + len(ids) > scorer.batch_tokens:
            yield from _score_batch(scorer, first, batch)
            batch, first, size = [], number, 0
        if len(ids) > scorer.batch_tokens:
            yield from _score_long(scorer, number, chain([ids], parts))
            first = number + 1
        else:
            batch.append(ids)
            size += len(ids)
    yield from _score_batch(scorer, first, batch)


def last_batch(lengths: Sequence[int], batch_tokens: int) -> int:
    """Where the last batch of documents with these numbers of tokens begins; it may take more of them."""
    start = size = 0
    for number, length in enumerate(lengths):
        size += length
        if size > batch_tokens:
            start, size = (number, length) if length <= batch_tokens else (number + 1, 0)
    return start


def _score_batch(scorer: Scorer, first: int, batch: list[list[int]]) -> Iterator[Part]:
    # A token alone, such as the end token of an empty document, has nothing before it.
    chosen = [number for number, ids in enumerate(batch) if len(ids) > 1]
    requests = [Request(batch[number][:1], batch[number][1:]) for number in chosen]
    scores = {chosen[score.index]: score.logprobs for score in scorer.score(requests)}
    for number, ids in enumerate(batch):
        yield Part(first + number, 0, np.array(ids[1:], np.int64), scores.get(number, np.zeros(0)))


def _score_long(scorer: Scorer, number: int, parts: Iterable[Sequence[int]]) -> Iterator[Part]:
    """One document, a pass at a time with the state passed on."""
    state, before, start = scorer.model.init_state(1), np.zeros(0, np.int64), 0
    for part in parts:
        for low in range(0, len(part), scorer.batch_tokens):
            ids = np.append(before, np.array(part[low : low + scorer.batch_tokens], np.int64))
            before, targets = ids[-1:], ids[1:]
            if len(targets):
                logprobs, state = scorer.read_on(ids[:-1], targets, state)
                yield Part(number, start, targets, logprobs)
                start += len(targets)
