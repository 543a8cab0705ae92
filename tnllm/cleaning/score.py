"""How likely a model finds documents: nats, bits per byte and perplexity of each, in constant memory.

    ready = load("runs/tiny")
    for score in score_texts(ready.model, ready.tokenizer, texts):
        score.bits_per_byte, score.perplexity

A document's tokens from the second to its end token are predicted, each from all before it; nothing of one document
reaches another. Short ones go through the model together; of a long one, a chunk at a time, the state carried on, so
that a document of any length takes the same memory on the device.
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
# fp32 logits held at once.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True)
class Score:
    """`nats` over `tokens` predicted tokens, which stand for `num_bytes` bytes of text."""

    tokens: int
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What selection compares: it does not depend on how a tokenizer cuts a language."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token; infinite where that is no finite number."""
        mean = self.nats / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def score_texts(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str], chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[Score]:
    """The score of every text, in order. Raises UserError for a text that is no Unicode."""
    lengths = torch.tensor([len(data) for data in tokenizer.token_bytes])
    waiting: list[Tensor] = []
    held = 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, eos=True))
        if waiting and held + len(ids) > chunk_tokens:
            yield from _scores(waiting, _packed_nats(model, waiting), lengths)
            waiting, held = [], 0
        if len(ids) > chunk_tokens:
            yield from _scores([ids], [_long_nats(model, ids, chunk_tokens)], lengths)
        else:
            waiting.append(ids)
            held += len(ids)
    if waiting:
        yield from _scores(waiting, _packed_nats(model, waiting), lengths)


def _scores(documents: list[Tensor], nats: list[float], lengths: Tensor) -> Iterator[Score]:
    for ids, value in zip(documents, nats, strict=True):
        yield Score(len(ids) - 1, value, int(lengths[ids[1:]].sum()))


def _packed_nats(model: LanguageModel, documents: list[Tensor]) -> list[float]:
    """Nats of short documents, all in one pass."""
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
    """hidden [T, M], targets [T] → nats [T] fp32 on the CPU; the logits of all tokens are never held together."""
    step = max(1, _MAX_LOGITS // model.config.vocab_size)
    parts = [
        F.cross_entropy(model.logits(hidden[at : at + step]), targets[at : at + step], reduction="none")
        for at in range(0, len(targets), step)
    ]
    return torch.cat(parts).float().cpu()
