"""A sample while it is decoded: its tokens, its text, and whether it has ended.

sampled = SampledTokens.of(columns)                      # the only synchronisation with the device
for piece in row.append(sampled, index, eos_ids, tokenizer):
    ...                                                  # up to the row's end, if it is among them
row.result()
"""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tnllm.generation.context import Context
from tnllm.generation.grammar import Matcher
from tnllm.generation.lookup import Lookup
from tnllm.generation.sampler import MAX_SEED, SamplingParams
from tnllm.generation.text import TextStream
from tnllm.tokenizer import Tokenizer

# "eos": the end token, or the end of a grammar.
FinishReason = Literal["stop", "length", "eos"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the model, before any sampling option."""

    id: int
    text: str  # its bytes as UTF-8; U+FFFD for part of a character
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the most likely ones, in descending order


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token."""

    index: int  # of the prompt
    sample: int  # 0 to n - 1
    token: int
    text: str  # what is certain with it: complete characters, nothing of a stop string, often ""
    logprobs: tuple[TokenLogprob, ...]  # if asked for: of this token and those before whose text is certain only now


@dataclass(frozen=True)
class Result:
    """One finished sample. `text` is the sum of its pieces' texts."""

    index: int
    sample: int
    text: str
    tokens: list[int]  # all generated ones, the end token and those of a stop string included
    finish_reason: FinishReason
    seed: int
    prompt_tokens: int  # read for this request; a given context counts only in `context`
    logprobs: list[TokenLogprob] | None  # of the tokens of the text: none of a stop string
    context: Context | None  # after the last token, if asked for


@dataclass(frozen=True)
class SampledTokens:
    """The tokens of a few steps on the host, by row and step."""

    tokens: list[list[int]]
    finite: list[list[bool]]  # whether the logits were finite
    logprobs: list[list[Any]] | None  # of the tokens, of the most likely ones, and the ids of these

    @staticmethod
    def of(columns: Sequence[Sequence[Tensor]]) -> "SampledTokens":
        """Copy to the host what was sampled at each step: tokens [B], whether finite [B], log-probabilities if any."""
        stacked = [torch.stack(parts, dim=1).cpu() for parts in zip(*columns, strict=True)]
        return SampledTokens(stacked[0].tolist(), stacked[1].tolist(), [part.tolist() for part in stacked[2:]] or None)


@dataclass(eq=False)
class Row:
    """A sample while it is decoded."""

    index: int
    sample: int
    params: SamplingParams
    seed: int
    prompt_tokens: int
    tail: tuple[int, ...]
    stream: TextStream
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    # Those that are not certain yet: a stop string may begin before their tokens. Each with its token's first character.
    held: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)
    num_chars: int = 0  # of `texts`
    reason: FinishReason | None = None
    context: Context | None = None  # after its last token, if it is to be kept
    matcher: Matcher | None = None  # where it stands in its grammar, if it has one
    lookup: Lookup | None = None  # of prompt and text, if earlier passages are to be proposed

    @property
    def left(self) -> int:
        """Number of tokens it may still generate."""
        return self.params.max_tokens - len(self.tokens)

    def append(
        self, sampled: SampledTokens, index: int, eos_ids: frozenset[int], tokenizer: Tokenizer
    ) -> Iterator[Piece]:
        """Append the tokens sampled for row `index` of the batch, up to the row's end if it is among them."""
        for step, token in enumerate(sampled.tokens[index]):
            logprob = None
            if self.params.logprobs is not None and sampled.logprobs is not None:
                chosen, top, ids = (values[index][step] for values in sampled.logprobs)
                logprob = token_logprob(tokenizer, token, chosen, top, ids[: self.params.logprobs])
            yield self._append_token(token, logprob, eos_ids)
            if self.reason:
                return

    def _append_token(self, token: int, logprob: TokenLogprob | None, eos_ids: frozenset[int]) -> Piece:
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.push(token)
        if logprob is not None:
            self.held.append((self.stream.num_chars, logprob))
        text = ""
        if token in eos_ids and not self.params.ignore_eos:
            self.reason = "eos"
        else:
            text = self.stream.push(token)
            if self.stream.stopped:
                self.reason = "stop"
            elif self.matcher is not None and self.matcher.push(token):
                self.reason = "eos"
            elif len(self.tokens) == self.params.max_tokens:
                self.reason = "length"
        if self.reason:
            text += self.stream.close()
        self.texts.append(text)
        self.num_chars += len(text)
        certain: list[TokenLogprob] = []
        while self.held and (self.held[0][0] < self.num_chars or self.reason in ("eos", "length")):
            certain.append(self.held.popleft()[1])
        self.logprobs += certain
        return Piece(self.index, self.sample, token, text, tuple(certain))

    def result(self) -> Result:
        """The sample, which must have ended."""
        assert self.reason is not None
        logprobs = self.logprobs if self.params.logprobs is not None else None
        return Result(
            self.index, self.sample, "".join(self.texts), self.tokens, self.reason, self.seed, self.prompt_tokens,
            logprobs, self.context,
        )  # fmt: skip


def token_logprob(
    tokenizer: Tokenizer, id: int, logprob: float, top: Sequence[float], top_ids: Sequence[int]
) -> TokenLogprob:
    """A TokenLogprob from plain numbers; `top` may be longer than `top_ids`."""

    def entry(id: int, logprob: float, alternatives: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(id, tokenizer.token_bytes[id].decode("utf-8", "replace"), logprob, alternatives)

    return entry(id, logprob, tuple(entry(*pair) for pair in zip(top_ids, top, strict=False)))


def start_rows(
    tokenizer: Tokenizer,
    index: int,
    params: SamplingParams,
    prompt_tokens: int,
    tail: tuple[int, ...],
    ids: Sequence[int] | np.ndarray = (),
) -> list[Row]:
    """The `params.n` samples of a prompt whose last ids are `tail`; sample i has seed + i. ids: searched by a lookup."""
    # 32 random bits are short enough to be typed again.
    first = secrets.randbits(32) if params.seed is None else params.seed
    return [
        Row(
            index, sample, params, (first + sample) & MAX_SEED, prompt_tokens, tail,
            TextStream(tokenizer, tail, params.stop), matcher=params.grammar.matcher() if params.grammar else None,
            lookup=Lookup(ids, params.prompt_lookup) if params.prompt_lookup else None,
        )
        for sample in range(params.n)
    ]  # fmt: skip
