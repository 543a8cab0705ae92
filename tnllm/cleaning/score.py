"""Log-likelihood of documents under a model: nats, bits per byte and perplexity of each, in constant memory.

    ready = load("runs/tiny")
    for score in score_texts(ready.model, ready.tokenizer, texts):
        score.bits_per_byte, score.perplexity

Each token of a document from the second to the end token is predicted from all tokens before it; documents do not see
each other. Short documents are packed into one pass. A long one is processed in chunks with the state passed on, so the
memory on the device does not depend on its length.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.modeling.model import LanguageModel
from tnllm.modeling.packing import pack
from tnllm.tokenizer import Tokenizer

CHUNK_TOKENS = 4096
# fp32 logits in memory at a time.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True)
class Score:
    """Total `nats` of `tokens` predicted tokens, which stand for `num_bytes` bytes of text."""

    tokens: int
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The value that selection compares: it does not depend on the tokenizer."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token; infinity if that overflows."""
        mean = self.nats / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def score_texts(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str], chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[Score]:
    """The score of every text, in order. Raises UserError for text with lone surrogates."""
    lengths = torch.tensor([len(data) for data in tokenizer.token_bytes])
    batch: list[Tensor] = []
    num_tokens = 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, eos=True))
        if batch and num_tokens + len(ids) > chunk_tokens:
            yield from _scores(batch, _packed_nats(model, batch), lengths)
            batch, num_tokens = [], 0
        if len(ids) > chunk_tokens:
            yield from _scores([ids], [_long_nats(model, ids, chunk_tokens)], lengths)
        else:
            batch.append(ids)
            num_tokens += len(ids)
    if batch:
        yield from _scores(batch, _packed_nats(model, batch), lengths)


def _scores(documents: list[Tensor], nats: list[float], lengths: Tensor) -> Iterator[Score]:
    for ids, value in zip(documents, nats, strict=True):
        yield Score(len(ids) - 1, value, int(lengths[ids[1:]].sum()))


def _packed_nats(model: LanguageModel, documents: list[Tensor]) -> list[float]:
    """Nats of short documents, packed into one pass."""
    tokens, cu_seqlens = pack(documents)
    tokens, starts, ends = tokens.to(model.device), cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    hidden, _ = model.hidden(tokens, None, cu_seqlens.to(model.device))
    nats = _token_nats(model, hidden[0, :-1], tokens[0, 1:]) if tokens.numel() > 1 else torch.zeros(0)
    sums = F.pad(nats.double().cumsum(0), (1, 0))
    # Position p of `nats` predicts token p + 1; a document of n tokens has n - 1 of them.
    return (sums[ends - 1] - sums[starts]).tolist()


def _long_nats(model: LanguageModel, ids: Tensor, chunk_tokens: int) -> float:
    total, state = 0.0, None
    for start in range(0, len(ids) - 1, chunk_tokens):
        end = min(start + chunk_tokens, len(ids) - 1)
        hidden, state = model.hidden(ids[None, start:end].to(model.device), state)
        total += float(_token_nats(model, hidden[0], ids[start + 1 : end + 1].to(model.device)).double().sum())
    return total


def _token_nats(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [T, M], targets [T] → nats [T] fp32 on the CPU; only a part of the logits is in memory at a time."""
    step = max(1, _MAX_LOGITS // model.config.vocab_size)
    parts = [
        F.cross_entropy(model.logits(hidden[at : at + step]), targets[at : at + step], reduction="none")
        for at in range(0, len(targets), step)
    ]
    return torch.cat(parts).float().cpu()
