"""Prompts in, text out: read the prompts, then one token per step from a recurrent state of constant size.

    text = generate_text(model, tokenizer, "Once upon a time", max_tokens=50, temperature=0.8, seed=1)

    for event in generate(model, tokenizer, ["One", "Two"], SamplingParams(seed=1)):
        if isinstance(event, Piece):
            print(event.index, event.text)          # as it comes
        else:
            print(event.index, event.finish_reason) # a Result: one per sample, with the whole text

A sample depends on its prompt, its options and its seed alone: not on what else is in the batch, on the chunks a
prompt is read in, or on whether it started from a saved context.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.context import CHUNK_TOKENS, Context, read
from tnllm.generation.graph import CapturedStep, can_capture
from tnllm.generation.sampler import MAX_SEED, Options, SamplingParams, choose, log_probabilities
from tnllm.generation.text import TAIL_TOKENS, TextStream
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State
from tnllm.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "eos"]
# Rows decoded together. A step reads every weight once whatever the batch, so rows are nearly free until the
# states (13 MB a row at 385M) or the arithmetic count.
BATCH_SIZE = 16
# Tokens between two looks at the results on a GPU. A look stalls the device for about a kernel launch; up to this
# many steps minus one are wasted after a stop.
SYNC_EVERY = 8


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before any sampling option."""

    id: int
    text: str  # its bytes as UTF-8, U+FFFD where they are part of a character
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the likeliest ones, likeliest first


@dataclass(frozen=True)
class Piece:
    """One generated token."""

    index: int  # of the prompt
    sample: int  # 0 to n - 1
    token: int
    text: str  # what became certain with it: whole characters, nothing of a stop string, often ""
    logprob: TokenLogprob | None


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
    logprobs: list[TokenLogprob] | None
    context: Context | None  # after the last token, if asked for


@dataclass
class _Row:
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
    reason: FinishReason | None = None
    reported: bool = False

    @property
    def left(self) -> int:
        """Tokens it may still generate."""
        return self.params.max_tokens - len(self.tokens)

    def result(self, context: Context | None) -> Result:
        assert self.reason is not None
        return Result(
            index=self.index,
            sample=self.sample,
            text="".join(self.texts),
            tokens=self.tokens,
            finish_reason=self.reason,
            seed=self.seed,
            prompt_tokens=self.prompt_tokens,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            context=context,
        )


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> str:
    """The continuation of `prompt`; keywords are the fields of SamplingParams. The prompt itself is not in it.

    An empty prompt starts from the begin token. Raises UserError for a bad option.
    """
    params = SamplingParams.of(sampling)
    if params.n != 1:
        raise UserError(f"n is {params.n}; generate_text gives one text: use generate for several")
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
    events = generate(model, tokenizer, [ids], params)
    return next(event.text for event in events if isinstance(event, Result))


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    contexts: Sequence[Context | None] | None = None,
    keep_contexts: bool = False,
    eos_ids: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    chunk_tokens: int = CHUNK_TOKENS,
    sync_every: int | None = None,
) -> Iterator[Piece | Result]:
    """Generate `params.n` samples for each prompt: a Piece per token as it comes, a Result per sample at its end.

    prompts: texts or token ids; an empty one needs a context to go on from. params: one for all, or one each.
    contexts: what to read each prompt after. keep_contexts: give each Result the context after its last token.
    eos_ids: tokens that end a text (the tokenizer's). batch_size: rows decoded together; a prompt's samples
    always are. Results of a batch come in the order they finish, batches in the order of the prompts.
    sync_every: tokens between two looks at the results (1 on CPU and with keep_contexts, else SYNC_EVERY).
    Raises UserError for a bad prompt, before anything is generated, RunError when the model gives non-finite logits.
    """
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(ids)
    befores: list[Context | None] = [None] * len(ids) if contexts is None else list(contexts)
    assert len(params) == len(befores) == len(ids), "one of params and contexts for each prompt"
    for index, (prompt, before) in enumerate(zip(ids, befores, strict=True)):
        if not prompt and before is None:
            raise UserError(f"prompt {index} is empty; give text, or the begin token to start from nothing")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    if sync_every is None:
        sync_every = SYNC_EVERY if model.device.type == "cuda" else 1
    ends = frozenset([tokenizer.eos_id] if eos_ids is None else eos_ids)

    def batches() -> Iterator[Piece | Result]:
        start = 0
        while start < len(ids):
            end, num_rows = start, 0
            while end < len(ids) and (num_rows == 0 or num_rows + params[end].n <= batch_size):
                num_rows += params[end].n
                end += 1
            contexts = read(model, ids[start:end], befores[start:end], chunk_tokens)
            rows, origins = [], []
            for index, context in zip(range(start, end), contexts, strict=True):
                rows += _rows(tokenizer, index, params[index], len(ids[index]), context)
                origins += [context] * params[index].n
            yield from _Batch(model, tokenizer, rows, origins, ends).run(keep_contexts, sync_every)
            start = end

    return batches()


def _rows(tokenizer: Tokenizer, index: int, params: SamplingParams, prompt_tokens: int, context: Context) -> list[_Row]:
    # 32 random bits are easy to read and type again.
    first = secrets.randbits(32) if params.seed is None else params.seed
    return [
        _Row(
            index, sample, params, (first + sample) & MAX_SEED, prompt_tokens, context.tail,
            TextStream(tokenizer, context.tail, params.stop),
        )
        for sample in range(params.n)
    ]  # fmt: skip


class _Batch:
    """Rows decoded together. Its state is a private copy that steps change in place."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        rows: list[_Row],
        contexts: list[Context],
        ends: frozenset[int],
    ) -> None:
        self.model, self.tokenizer, self.rows, self.ends = model, tokenizer, rows, ends
        self.state = State.cat([context.state for context in contexts])
        self.logits = torch.cat([context.logits for context in contexts])
        self.seen = torch.cat([context.seen for context in contexts])
        self.options = self._options()
        self.counts = torch.zeros_like(self.seen, dtype=torch.int32) if self.options.counts else None
        wanted = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        self.num_top = max(wanted, default=None)
        self.step: CapturedStep | None = None

    def _options(self) -> Options:
        return Options.of([row.params for row in self.rows], [row.seed for row in self.rows], self.model.device)

    def run(self, keep_contexts: bool, sync_every: int) -> Iterator[Piece | Result]:
        """Decode every row to its end."""
        for row in self.rows:
            if row.params.max_tokens == 0:
                row.reason = "length"
        while True:
            for place, row in enumerate(self.rows):
                if row.reason and not row.reported:
                    row.reported = True
                    yield row.result(self._context(place) if keep_contexts else None)
            alive = [place for place, row in enumerate(self.rows) if not row.reason]
            if not alive:
                return
            self._compact(alive)
            left = [row.left for row in self.rows if not row.reason]
            drawn = self._draw(1 if keep_contexts else min(*left, sync_every))
            for place, row in enumerate(self.rows):
                if not row.reason:
                    yield from self._take(row, place, drawn)
            # A kept context holds every token; otherwise the last one need not be read.
            if keep_contexts or not all(row.reason for row in self.rows):
                self._read(drawn.last)

    @torch.no_grad()
    def _draw(self, num_tokens: int) -> "_Drawn":
        """The next `num_tokens` tokens of every row; the last one is not read yet."""
        columns: list[list[Tensor]] = []
        tokens: Tensor | None = None
        for _ in range(num_tokens):
            if tokens is not None:
                self._read(tokens)
            # A NaN or an infinity anywhere in the row reaches its maximum; only -inf would not, and is harmless.
            finite = self.logits.amax(dim=-1).isfinite()
            # Ids beyond the tokenizer's have no text: vocabularies are padded to round sizes.
            self.logits[:, self.tokenizer.vocab_size :] = -torch.inf
            tokens = choose(self.logits, self.options, self.state.position, self.seen, self.counts)
            column = [tokens, finite]
            if self.num_top is not None:
                column += log_probabilities(self.logits, tokens, self.num_top)
            columns.append(column)
        assert tokens is not None
        stacked = [torch.stack(parts, dim=1).cpu() for parts in zip(*columns, strict=True)]
        if not stacked[1].all():
            place = int((~stacked[1].all(dim=1)).nonzero()[0, 0])
            at = int(self.state.position[place])
            raise RunError(
                f"the model gave non-finite logits near token {at}; its weights are damaged or its training diverged"
            )
        logprobs = [part.tolist() for part in stacked[2:]] or None
        return _Drawn(tokens, stacked[0].tolist(), logprobs)

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
        self.logits = self.step(tokens) if self.step else self.model.step(tokens, self.state)

    def _take(self, row: _Row, place: int, drawn: "_Drawn") -> Iterator[Piece]:
        """Append the drawn tokens to a row, up to its end if it is among them."""
        for column, token in enumerate(drawn.tokens[place]):
            row.tokens.append(token)
            text = ""
            if token in self.ends and not row.params.ignore_eos:
                row.reason = "eos"
            else:
                text = row.stream.push(token)
                if row.stream.stopped:
                    row.reason = "stop"
                elif len(row.tokens) == row.params.max_tokens:
                    row.reason = "length"
            if row.reason:
                text += row.stream.close()
            row.texts.append(text)
            logprob = None
            if row.params.logprobs is not None and drawn.logprobs is not None:
                logprob = self._logprob(token, row.params.logprobs, *(part[place][column] for part in drawn.logprobs))
                row.logprobs.append(logprob)
            yield Piece(row.index, row.sample, token, text, logprob)
            if row.reason:
                return

    def _logprob(self, token: int, num_top: int, chosen: float, top: list[float], ids: list[int]) -> TokenLogprob:
        def entry(id: int, logprob: float, likeliest: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
            return TokenLogprob(id, self.tokenizer.token_bytes[id].decode("utf-8", "replace"), logprob, likeliest)

        return entry(token, chosen, tuple(entry(*pair) for pair in zip(ids[:num_top], top, strict=False)))

    def _context(self, place: int) -> Context:
        row = self.rows[place]
        return Context(
            self.state.select([place]),
            self.logits[place : place + 1].clone(),
            self.seen[place : place + 1].clone(),
            (*row.tail, *row.tokens)[-TAIL_TOKENS:],
        )

    def _compact(self, alive: list[int]) -> None:
        """Move the rows that go on together. A captured step is for a fixed batch, so it goes on until half are left."""
        if len(alive) < len(self.rows) and (self.step is None or 2 * len(alive) <= len(self.rows)):
            self.step = None
            self.rows = [self.rows[place] for place in alive]
            index = torch.tensor(alive, device=self.logits.device)
            self.state = self.state.select(index)
            self.logits, self.seen = self.logits[index], self.seen[index]
            self.counts = None if self.counts is None else self.counts[index]
            self.options = self._options()
        if self.step is None and can_capture(self.model, max(row.left for row in self.rows if not row.reason)):
            self.step = CapturedStep(self.model, self.state)


@dataclass(frozen=True)
class _Drawn:
    """Tokens of a few steps on the host: [B][steps]; `last` [B] is still on the device."""

    last: Tensor
    tokens: list[list[int]]
    logprobs: list[list[Any]] | None
