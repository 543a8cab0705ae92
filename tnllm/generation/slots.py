"""Rows decoded together: a fixed number of slots in one state; rows join and leave between any two steps.

slots = Slots(model, tokenizer, 64)
slots.join(row, Parked(context))    # a copy of the context becomes the row's state
while slots.rows:
    for row, pieces in slots.decode(eos_ids):
        ...                         # a few more tokens of each row; finished rows have left

`decoder.generate` and the serving engine are both loops around this class, so they give the same text.

Active rows come first: the last row replaces one that leaves. So a step runs on the first rows of the tensors, without
gaps and without allocating states. On a GPU steps are captured as CUDA graphs for a few batch sizes; the rows above the
active ones are padding, and their results are discarded.

A row that is decoded alone may have its next tokens proposed (`lookup.py`). One pass then verifies them all: the state
stays at the last token that was accepted until it is known how many are. On a CPU in float32 the text is that of steps
alone: where a pass, or a step after one, decides by so little that rounding might, the tokens since are read again by
steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.captured_step import MIN_STEPS, CapturedStep, can_capture
from tnllm.generation.context import Context
from tnllm.generation.grammar import Matcher
from tnllm.generation.lookup import WORTH
from tnllm.generation.sampler import Options, log_probabilities, sample_surely
from tnllm.generation.samples import Piece, Row, SampledTokens
from tnllm.generation.text import TAIL_TOKENS
from tnllm.modeling.cpu_step import CpuStep, cpu_step
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State
from tnllm.tokenizer import Tokenizer

# Tokens between two synchronisations with a GPU. Each stalls the device for about a kernel launch; after a stop, up to
# SYNC_EVERY - 1 steps are wasted.
SYNC_EVERY = 8
# How far logits of a pass, or of steps after one, may be from those of steps alone, over the largest of them: five times
# what was measured (at most 4.3e-6 in random models whose weights magnify differences, 2.1e-6 in the demo).
_ROUNDING = 2e-5


class _ModelChunk:
    """`cpu_step(consecutive=True)` for every other model. The state it is given stays as it is, caches too."""

    def __init__(self, model: LanguageModel, state: State) -> None:
        self._model, self._state = model, state

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens[None]
        logits, self._after = self._model(self._tokens, self._state.first(1))
        return logits[0]

    def advance(self, count: int) -> None:
        if count < self._tokens.shape[1]:
            self._after = self._model.hidden(self._tokens[:, :count], self._state.first(1))[1]
        self._state.write(0, self._after)


def check_lookup(model: LanguageModel) -> None:
    """Raise UserError for a model whose steps cost no more than their share of a pass."""
    if model.is_int8 or can_capture(model, MIN_STEPS):
        what = "int8 weights" if model.is_int8 else "a model whose steps are CUDA graphs"
        raise UserError(f"prompt_lookup gains nothing with {what}; leave it out, or use float32 on a CPU")


@dataclass(frozen=True)
class Parked:
    """What a row continues from. With the Row itself, which holds its text, this is all there is to it."""

    context: Context  # the next token's noise follows from its position
    counts: Tensor | None = None  # [1, V] int32, of the tokens generated, where a penalty asks for them


@dataclass(frozen=True)
class _Active:
    """The slots of the active rows, as views: made once they change, since a view costs an operator each step."""

    options: Options
    num_top: int | None  # most likely tokens to report, where a row asks for log-probabilities
    logits: Tensor
    padding: Tensor | None  # logits of ids that the tokenizer does not have
    seen: Tensor
    counts: Tensor | None
    tokens: Tensor
    position: Tensor
    bias: Tensor | None  # [B, V], added to the logits
    matchers: dict[int, Matcher]  # by row, of those with a grammar


class Slots:
    """Decodes up to `num_slots` rows together."""

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        num_slots: int,
        *,
        keep_contexts: bool = False,
        sync_every: int | None = None,
    ) -> None:
        """keep_contexts: give each row that ends the context after its last token. sync_every: tokens between two
        synchronisations; None: SYNC_EVERY where steps can be captured, else 1.
        """
        self._model, self._tokenizer = model, tokenizer
        self.num_slots = num_slots
        self._clear_state()
        vocab_size, dtype = model.config.vocab_size, torch.promote_types(model.dtype, torch.float32)
        self._logits = torch.zeros(num_slots, vocab_size, dtype=dtype, device=model.device)
        self._seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=model.device)
        self._counts: Tensor | None = None  # [slots, V]; allocated for the first row that needs it
        self._active: _Active | None = None  # None after a row joined or left
        self._tokens = torch.zeros(num_slots, dtype=torch.int64, device=model.device)  # sampled last
        # Whether a token is fed to the model before the host has seen it: the device computes while the host processes
        # tokens, and results of rows that have ended are discarded. A kept context holds its last token, too.
        self._ahead = keep_contexts or can_capture(model, MIN_STEPS)
        self._keep_contexts = keep_contexts
        self._sync_every = 1 if keep_contexts else sync_every or (SYNC_EVERY if self._ahead else 1)
        self._steps: dict[int, CapturedStep] = {}  # by batch size
        self._on_cpu = cpu_step(model, self._state, self._logits)
        is_exact = model.device.type == "cpu" and model.dtype != torch.bfloat16
        self._rounding = _ROUNDING if is_exact else 0.0
        # Of a row decoded alone with passes: the state before the first of them, and how many of its tokens that holds.
        self._exact: tuple[State, int] | None = None
        self._latest: CapturedStep | None = None  # the step that gave the logits of the active rows
        self._unread = False  # whether the active rows' latest tokens are yet to be fed to the model
        self.rows: list[Row] = []

    def _clear_state(self) -> None:
        self._state = self._model.init_state(self.num_slots)
        flat = cpu_step(self._model, self._state, consecutive=True)
        self._chunk: CpuStep | _ModelChunk = flat or _ModelChunk(self._model, self._state)

    @property
    def free(self) -> int:
        return self.num_slots - len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, active or free."""
        counts = self._counts.nbytes if self._counts is not None else 0
        return self._state.nbytes + self._logits.nbytes + self._seen.nbytes + counts

    def warm_up(self) -> None:
        """Capture every batch size now rather than while a request waits. Does nothing on a CPU."""
        for power in range(self.num_slots.bit_length() + 1):
            self._captured(min(1 << power, self.num_slots), MIN_STEPS)

    @torch.no_grad()
    def join(self, row: Row, parked: Parked) -> None:
        """Put a row into a free slot, where it continues from a copy of `parked`."""
        self._catch_up()
        slot, context = len(self.rows), parked.context
        assert slot < self._state.batch
        self._state.write(slot, context.state)
        self._logits[slot].copy_(context.logits[0])
        self._seen[slot].copy_(context.seen[0])
        if _has_counts(row):
            if self._counts is None:
                self._counts = torch.zeros_like(self._seen, dtype=torch.int32)
            self._counts[slot].copy_(torch.zeros(()) if parked.counts is None else parked.counts[0])
        self.rows.append(row)
        self._active = self._latest = self._exact = None

    @torch.no_grad()
    def park(self, row: Row) -> Parked:
        """Free the slot of a row that is to continue later, whose state is copied to the host."""
        self._catch_up()
        slot, context = self.rows.index(row), self._context(row)
        counts = None
        if self._counts is not None and _has_counts(row):
            counts = self._counts[slot : slot + 1].to("cpu", copy=True)
        self.leave(row)
        return Parked(context.to("cpu"), counts)

    @torch.no_grad()
    def leave(self, row: Row) -> None:
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot != last:
            self._state.write(slot, self._state, last)
            tensors = [self._logits, self._seen, self._tokens]
            for tensor in [*tensors, self._counts] if self._counts is not None else tensors:
                tensor[slot].copy_(tensor[last])
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        if not self.rows and self._state.grows:
            # One long text has made every slot's cache as long.
            self._clear_state()
        self._active = self._latest = self._exact = None

    @torch.no_grad()
    def decode(self, eos_ids: frozenset[int]) -> list[tuple[Row, list[Piece] | RunError]]:
        """A few more tokens of every row (one on a CPU, or those verified), with one synchronisation; finished rows leave.

        A row whose logits are not finite leaves with an error in place of its pieces; the others continue.
        """
        rows, proposal = list(self.rows), self._proposal()
        fed = [*rows[0].tokens[-1:], *proposal] if self._unread else proposal
        sampled = self._verify(rows[0], proposal, fed) if proposal else None
        was_verified = sampled is not None
        if sampled is None:
            sampled = self._sample_steps()
        results: list[tuple[Row, list[Piece] | RunError]] = []
        for index, row in enumerate(rows):
            # Logits after a row's last token are discarded, so they need not be finite.
            if row.matcher is not None and (error := row.matcher.error):
                results.append((row, error))
            elif all(sampled.finite[index][: row.left]):
                pieces = list(row.append(sampled, index, eos_ids, self._tokenizer))
                results.append((row, pieces))
                if was_verified:
                    self._accept(row, fed, len(fed) - len(proposal), len(pieces))
            else:
                near = int(self._state.position[index])
                results.append((row, RunError(f"the model gave non-finite logits near token {near}; its weights are "
                                              "damaged or its training diverged")))  # fmt: skip
        for row, outcome in results:
            if self._keep_contexts and row.reason:
                self._catch_up()
                row.context = self._context(row)
            if row.reason or isinstance(outcome, RunError):
                self.leave(row)
        return results

    def _sample_steps(self) -> SampledTokens:
        """One token of every row, or a few where steps need not wait for the host."""
        self._catch_up()
        columns: list[list[Tensor]] = []
        # What may follow in a grammar is known once the host has seen the token.
        has_grammar = any(row.matcher is not None for row in self.rows)
        for _ in range(1 if has_grammar else min(self._sync_every, max(row.left for row in self.rows))):
            if columns:
                self._read()
            column, sure = self._sample(self._views(), self._rounding if self._exact else 0.0)
            if sure is not None and not bool(sure):
                self._read_again()
                column, _ = self._sample(self._views())
            columns.append(column)
        if self._ahead:
            self._read()
        # On a CPU a token is shown before the next step is computed, which takes as long as the reader waits.
        self._unread = not self._ahead
        return SampledTokens.of(columns)

    def _proposal(self) -> list[int]:
        """What may follow in the text that is decoded alone; several share the reading of the weights as it is."""
        row = self.rows[0]
        if len(self.rows) > 1 or row.lookup is None or row.matcher is not None or row.left <= WORTH:
            return []
        proposal, config = row.lookup.propose(), self._model.config
        if proposal and config.position == "ape":
            return proposal[: max(0, config.max_position - int(self._state.position[0]) - self._unread)]
        return proposal

    def _verify(self, row: Row, proposal: list[int], fed: list[int]) -> SampledTokens | None:
        """Sample after each token of the proposal: those that agree with it, and the next one.

        `fed`: what is to be read, with a token before the proposal if that was put off. None if rounding might decide about
        the first one. The state stays as it is.
        """
        device, count, waits = self._logits.device, len(proposal) + 1, len(fed) - len(proposal)
        logits = self._chunk(torch.tensor(fed, device=device))
        logits = logits if waits else torch.cat([self._logits[:1], logits])
        seen = self._seen[:1].repeat(count, 1)
        counts = None if self._counts is None else self._counts[:1].repeat(count, 1)
        for index, token in enumerate(fed):
            seen[index + 1 - waits :, token] = True
            if counts is not None:
                counts[index + 1 - waits :, token] += 1
        own = self._tokenizer.vocab_size
        active = _Active(
            Options.of([row.params] * count, [row.seed] * count, device), row.params.logprobs, logits,
            logits[:, own:] if own < logits.shape[1] else None, seen, counts,
            torch.empty(count, dtype=torch.int64, device=device),
            self._state.position[:1] + waits + torch.arange(count, device=device), self._biases(), {},
        )  # fmt: skip
        column, sure = self._sample(active, self._rounding)
        tokens = column[0].tolist()
        agreed = next((index for index in range(len(proposal)) if tokens[index] != proposal[index]), len(proposal)) + 1
        if sure is not None:
            agreed = int((~sure[:agreed]).int().argmax()) if not bool(sure[:agreed].all()) else agreed
        if agreed == 0:
            return None
        return SampledTokens.of([[part[index : index + 1] for part in column] for index in range(agreed)])

    def _accept(self, row: Row, fed: list[int], waits: int, count: int) -> None:
        """Move the state to before the last of the `count` tokens that the row took from a verified proposal."""
        assert row.lookup is not None
        if self._rounding and self._exact is None:
            self._exact = self._state.select([0]), len(row.tokens) - count - waits
        read = fed[: waits + count - 1]
        if read:
            self._chunk.advance(len(read))
            index = torch.tensor(read, device=self._logits.device)
            self._seen[0, index] = True
            if self._counts is not None:
                self._counts[0].index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        row.lookup.verified(count - 1)
        self._tokens[0] = row.tokens[-1]
        self._unread = True

    def _read_again(self) -> None:
        """Read what a row decoded alone has read by passes, and since, by steps."""
        assert self._exact is not None
        state, count = self._exact
        self._state.write(0, state)
        for token in self.rows[0].tokens[count:]:
            self._tokens[0] = token
            self._step()
        self._exact = None

    def _catch_up(self) -> None:
        """Feed the active rows their latest tokens if that was put off."""
        if self._unread and self.rows:
            self._read()
        self._unread = False

    def _sample(self, active: _Active, rounding: float = 0.0) -> tuple[list[Tensor], Tensor | None]:
        """The next token of each row, on the device: tokens [B], whether the logits were finite [B], log-probabilities.

        And which do not depend on a `rounding` of the logits; see `sample_surely`.
        """
        sure = None
        options, logits = active.options, active.logits
        plain = not (options.draws or options.repetition or options.counts) and active.num_top is None
        plain = plain and active.bias is None and not active.matchers and not rounding
        if plain and self._latest is not None and self._latest.top_token is not None:
            # The graph has computed the argmax.
            count = len(self.rows)
            column = [self._latest.top_token[:count].clone(), self._latest.top_logit[:count].isfinite()]
        else:
            # A NaN or +inf anywhere in a row reaches its maximum; -inf does not, and is harmless.
            finite = logits.amax(dim=-1).isfinite()
            if active.padding is not None:
                active.padding.fill_(-torch.inf)
            given = _allowed(active), options, active.position, active.seen, active.counts
            tokens, sure = sample_surely(*given, rounding)
            column = [tokens, finite]
            if active.num_top is not None:
                column += log_probabilities(logits, tokens, active.num_top)
        active.tokens.copy_(column[0])
        return column, sure

    def _views(self) -> _Active:
        if self._active is None:
            rows, count = self.rows, len(self.rows)
            logits, own = self._logits[:count], self._tokenizer.vocab_size
            self._active = _Active(
                Options.of([row.params for row in rows], [row.seed for row in rows], self._model.device),
                max((row.params.logprobs for row in rows if row.params.logprobs is not None), default=None),
                logits,
                logits[:, own:] if own < logits.shape[1] else None,
                self._seen[:count],
                None if self._counts is None else self._counts[:count],
                self._tokens[:count],
                self._state.position[:count],
                self._biases(),
                {index: row.matcher for index, row in enumerate(rows) if row.matcher is not None},
            )
        return self._active

    def _biases(self) -> Tensor | None:
        if not any(row.params.logit_bias for row in self.rows):
            return None
        bias = torch.zeros(len(self.rows), self._logits.shape[1])
        for index, row in enumerate(self.rows):
            for id, value in row.params.logit_bias:
                bias[index, id] = value
        return bias.to(self._logits.device)

    def _read(self) -> None:
        """Feed each active row its latest token."""
        active = self._views()
        tokens = active.tokens[:, None]
        active.seen.scatter_(1, tokens, True)
        if active.counts is not None:
            active.counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))
        self._step()

    def _step(self) -> None:
        active, count = self._views(), len(self.rows)
        tokens = active.tokens
        self._latest = self._captured(count, max(row.left for row in self.rows))
        if self._latest is not None:
            active.logits.copy_(self._latest(self._tokens[: self._latest.batch])[:count])
        elif self._on_cpu is not None:
            self._on_cpu(tokens)
        else:
            active.logits.copy_(self._model.step(tokens, self._first(count)))

    def _captured(self, count: int, num_steps: int) -> CapturedStep | None:
        """A captured step of which at most half is padding; None if capturing does not pay off for `num_steps` steps."""
        size = min((size for size in self._steps if count <= size < 2 * count), default=None)
        if size is None and can_capture(self._model, num_steps):
            size = min(1 << (count - 1).bit_length(), self.num_slots)
            self._steps[size] = CapturedStep(self._model, self._first(size), self._tokenizer.vocab_size)
        return None if size is None else self._steps[size]

    def _first(self, count: int) -> State:
        """The state of the first rows, with room for their next tokens: a view."""
        self._state.reserve(count)
        return self._state.first(count)

    def _context(self, row: Row) -> Context:
        slot = self.rows.index(row)
        return Context(
            self._state.select([slot]),
            self._logits[slot : slot + 1].clone(),
            self._seen[slot : slot + 1].clone(),
            (*row.tail, *row.tokens)[-TAIL_TOKENS:],
        )


def _allowed(active: _Active) -> Tensor:
    """The logits with the rows' biases, and -inf for what their grammars exclude."""
    logits = active.logits if active.bias is None else active.logits + active.bias
    if active.matchers:
        excluded = torch.zeros_like(logits, dtype=torch.bool, device="cpu")
        for index, matcher in active.matchers.items():
            of_row = torch.from_numpy(matcher.excluded())
            excluded[index, : len(of_row)] = of_row
        logits = logits.masked_fill(excluded.to(logits.device), -torch.inf)
    return logits


def _has_counts(row: Row) -> bool:
    """Whether a penalty asks how often each token was generated."""
    return bool(row.params.presence_penalty or row.params.frequency_penalty)
