"""Prompts in, text out: prefill the prompts, then decode one token per step from a recurrent state of constant size.

    text = generate_text(model, tokenizer, "Once upon a time", max_tokens=50, temperature=0.8, seed=1)

    for event in generate(model, tokenizer, ["One", "Two"], SamplingParams(seed=1)):
        if isinstance(event, Piece):
            print(event.index, event.text)          # as it is generated
        else:
            print(event.index, event.finish_reason) # a Result: one per sample, with the complete text

A sample depends only on its prompt, options and seed: not on the rest of the batch, the chunks of the prefill, or whether
it started from a saved context.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.captured_step import CapturedStep, can_capture
from tnllm.generation.context import CHUNK_TOKENS, Context, read
from tnllm.generation.sampler import Options, SamplingParams
from tnllm.generation.samples import Piece, Result, Row, SampledTokens, most_logprobs, non_finite, sample, start_rows
from tnllm.generation.text import TAIL_TOKENS
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State
from tnllm.tokenizer import Tokenizer

# Rows decoded together. A step reads every weight once whatever the batch, so rows are nearly free until the
# states (13 MB a row at 385M) or the arithmetic count.
BATCH_SIZE = 16
# Tokens between two synchronisations with a GPU. Each stalls the device for about a kernel launch; after a stop, up to
# SYNC_EVERY - 1 steps are wasted.
SYNC_EVERY = 8


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> str:
    """The continuation of `prompt`, without the prompt; keywords are the fields of SamplingParams.

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
    """Generate `params.n` samples for each prompt: a Piece per token as it is generated, a Result per finished sample.

    prompts: texts or token ids; an empty one needs a context to continue. params: one for all, or one each.
    contexts: what precedes each prompt. keep_contexts: give each Result the context after its last token.
    eos_ids: tokens that end a text (default: the tokenizer's). batch_size: rows decoded together; samples of one prompt
    always are. Results of a batch come in the order they finish, batches in the order of the prompts.
    sync_every: tokens between two synchronisations (1 on CPU and with keep_contexts, else SYNC_EVERY).
    Raises UserError for a bad prompt, before anything is generated, RunError if the model gives non-finite logits.
    """
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(ids)
    befores: list[Context | None] = [None] * len(ids) if contexts is None else list(contexts)
    assert len(params) == len(befores) == len(ids), "one of params and contexts for each prompt"
    for index, (prompt, before) in enumerate(zip(ids, befores, strict=True)):
        if not prompt and before is None:
            raise UserError(f"prompt {index} is empty; give text, or the begin token to start from nothing")
    tokenizer.check_vocabulary(model.config.vocab_size)
    if sync_every is None:
        sync_every = SYNC_EVERY if model.device.type == "cuda" else 1
    stop_ids = frozenset([tokenizer.eos_id] if eos_ids is None else eos_ids)

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
                rows += start_rows(tokenizer, index, params[index], len(ids[index]), context.tail)
                origins += [context] * params[index].n
            yield from _Batch(model, tokenizer, rows, origins, stop_ids).run(keep_contexts, sync_every)
            start = end

    return batches()


class _Batch:
    """Rows decoded together. The state is a private copy that steps update in place."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        rows: list[Row],
        contexts: list[Context],
        eos_ids: frozenset[int],
    ) -> None:
        self.model, self.tokenizer, self.rows, self.eos_ids = model, tokenizer, rows, eos_ids
        self.state = State.cat([context.state for context in contexts])
        self.logits = torch.cat([context.logits for context in contexts])
        self.seen = torch.cat([context.seen for context in contexts])
        self.options = self._options()
        self.counts = torch.zeros_like(self.seen, dtype=torch.int32) if self.options.counts else None
        self.num_top = most_logprobs(rows)
        self.reported: set[tuple[int, int]] = set()
        self.step: CapturedStep | None = None

    def _options(self) -> Options:
        return Options.of([row.params for row in self.rows], [row.seed for row in self.rows], self.model.device)

    def run(self, keep_contexts: bool, sync_every: int) -> Iterator[Piece | Result]:
        """Decode every row to its end."""
        for row in self.rows:
            if row.params.max_tokens == 0:
                row.reason = "length"
        while True:
            for index, row in enumerate(self.rows):
                if row.reason and (row.index, row.sample) not in self.reported:
                    self.reported.add((row.index, row.sample))
                    yield row.result(self._context(index) if keep_contexts else None)
            active = [index for index, row in enumerate(self.rows) if not row.reason]
            if not active:
                return
            self._compact(active)
            left = [row.left for row in self.rows if not row.reason]
            sampled, last = self._sample(1 if keep_contexts else min(*left, sync_every))
            for index, row in enumerate(self.rows):
                if not row.reason:
                    yield from row.append(sampled, index, self.eos_ids, self.tokenizer)
            # A kept context holds every token; otherwise the last one need not be read.
            if keep_contexts or not all(row.reason for row in self.rows):
                self._read(last)

    @torch.no_grad()
    def _sample(self, num_tokens: int) -> tuple[SampledTokens, Tensor]:
        """The next `num_tokens` tokens of every row, and the last ones [B] on the device, not yet fed to the model."""
        columns: list[list[Tensor]] = []
        plain = not (self.options.draws or self.options.repetition or self.options.counts) and self.num_top is None
        for _ in range(num_tokens):
            if columns:
                self._read(columns[-1][0])
            if plain and self.step and self.step.top_token is not None and self.logits is self.step.logits:
                columns.append([self.step.top_token.clone(), self.step.top_logit.isfinite()])
                continue
            position, vocab_size = self.state.position, self.tokenizer.vocab_size
            columns.append(
                sample(self.logits, self.options, position, self.seen, self.counts, vocab_size, self.num_top)
            )
        sampled = SampledTokens.of(columns)
        for index, finite in enumerate(sampled.finite):
            if not all(finite):
                raise RunError(non_finite(int(self.state.position[index])))
        return sampled, columns[-1][0]

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
        self.logits = self.step(tokens) if self.step else self.model.step(tokens, self.state)

    def _context(self, index: int) -> Context:
        row = self.rows[index]
        return Context(
            self.state.select([index]),
            self.logits[index : index + 1].clone(),
            self.seen[index : index + 1].clone(),
            (*row.tail, *row.tokens)[-TAIL_TOKENS:],
        )

    def _compact(self, active: list[int]) -> None:
        """Drop finished rows. A captured step has a fixed batch size, so it is kept until half of the rows are left."""
        if len(active) < len(self.rows) and (self.step is None or 2 * len(active) <= len(self.rows)):
            self.step = None
            self.rows = [self.rows[row] for row in active]
            index = torch.tensor(active, device=self.logits.device)
            self.state = self.state.select(index)
            self.logits, self.seen = self.logits[index], self.seen[index]
            self.counts = None if self.counts is None else self.counts[index]
            self.options = self._options()
        if self.step is None and can_capture(self.model, max(row.left for row in self.rows if not row.reason)):
            self.step = CapturedStep(self.model, self.state, self.tokenizer.vocab_size)
