"""The batch a server decodes: a fixed number of slots in one state tensor; rows join and leave between any two steps.

slots = Slots(model, tokenizer, 64)
slots.join(row, context)            # a copy of the context becomes the row's state
for row, pieces in slots.decode(eos_ids):
    ...                             # a few more tokens of each row; finished rows have left

Active rows come first: the last row replaces one that leaves. So a step runs on the first rows of the tensors, without
gaps and without allocating states. On a GPU a few batch sizes are captured once as CUDA graphs; the rows above the
active ones are padding, and their results are discarded.
"""

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.captured_step import MIN_STEPS, CapturedStep, can_capture
from tnllm.generation.context import Context
from tnllm.generation.decoder import SYNC_EVERY
from tnllm.generation.sampler import Options
from tnllm.generation.samples import Piece, Row, SampledTokens, most_logprobs, non_finite, sample
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State
from tnllm.tokenizer import Tokenizer


class Slots:
    """Decodes up to `num_slots` rows together. Raises UserError for a model whose state has no fixed size."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, num_slots: int) -> None:
        if model.config.kind != "transnormer":
            raise UserError(
                f"model.kind is {model.config.kind!r}; serving needs 'transnormer', whose state has a fixed size: "
                "use tnllm generate"
            )
        self._model, self._tokenizer = model, tokenizer
        self._state = model.init_state(num_slots)
        vocab_size = model.config.vocab_size
        self._logits = torch.zeros(num_slots, vocab_size, device=model.device)
        if model.head_weight.dtype == torch.float64:
            self._logits = self._logits.double()
        self._seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=model.device)
        self._counts: Tensor | None = None  # [slots, V]; allocated for the first row that needs it
        self._options: Options | None = None  # of the active rows; None after a row joined or left
        self._tokens = torch.zeros(num_slots, dtype=torch.int64, device=model.device)  # sampled last
        self._ahead = can_capture(model, MIN_STEPS)
        self._steps: dict[int, CapturedStep] = {}
        self.rows: list[Row] = []
        self.num_slots = num_slots

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.num_slots - len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, active or free."""
        counts = self._counts.nbytes if self._counts is not None else 0
        return self._state.nbytes + self._logits.nbytes + self._seen.nbytes + counts

    def warm_up(self) -> None:
        """Capture every batch size now rather than while a request waits. Does nothing on a CPU."""
        if self._ahead:
            for size in _sizes(self.num_slots):
                self._captured(size)

    @torch.no_grad()
    def join(self, row: Row, context: Context) -> None:
        """Put a row into a free slot, with a copy of `context` as its state."""
        slot = len(self.rows)
        assert slot < self.num_slots
        for layer, own in zip(self._state.layers, context.state.layers, strict=True):
            layer[slot].copy_(own[0])
        self._state.position[slot] = context.state.position[0]
        self._logits[slot].copy_(context.logits[0])
        self._seen[slot].copy_(context.seen[0])
        if row.params.presence_penalty or row.params.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(self._seen, dtype=torch.int32)
            self._counts[slot].zero_()
        self.rows.append(row)
        self._options = None

    @torch.no_grad()
    def leave(self, row: Row) -> None:
        """Free a row's slot."""
        slot = next(slot for slot, other in enumerate(self.rows) if other is row)
        last = len(self.rows) - 1
        if slot != last:
            tensors = [*self._state.layers, self._state.position, self._logits, self._seen, self._tokens]
            for tensor in [*tensors, self._counts] if self._counts is not None else tensors:
                tensor[slot].copy_(tensor[last])
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self._options = None

    @torch.no_grad()
    def decode(self, eos_ids: frozenset[int]) -> list[tuple[Row, list[Piece] | RunError]]:
        """A few more tokens of every row (one on a CPU), with one synchronisation; finished rows leave.

        A row whose logits are not finite leaves with an error in place of its pieces; the others continue.
        """
        rows = list(self.rows)
        count = len(rows)
        if self._options is None:
            self._options = Options.of([row.params for row in rows], [row.seed for row in rows], self._model.device)
        num_top = most_logprobs(rows)
        counts = None if self._counts is None else self._counts[:count]
        columns: list[list[Tensor]] = []
        for _ in range(min(SYNC_EVERY if self._ahead else 1, max(row.left for row in rows))):
            if columns:
                self._read(columns[-1][0])
            columns.append(
                sample(
                    self._logits[:count], self._options, self._state.position[:count], self._seen[:count], counts,
                    self._tokenizer.vocab_size, num_top,
                )
            )  # fmt: skip
        self._tokens[:count].copy_(columns[-1][0])
        if self._ahead:
            # The device computes while the host processes the tokens; results of finished rows are discarded.
            self._read(self._tokens[:count])
        sampled = SampledTokens.of(columns)
        results: list[tuple[Row, list[Piece] | RunError]] = []
        for index, row in enumerate(rows):
            # Logits after a row's last token are discarded, so they need not be finite.
            if all(sampled.finite[index][: row.left]):
                results.append((row, list(row.append(sampled, index, eos_ids, self._tokenizer))))
            else:
                results.append((row, RunError(non_finite(int(self._state.position[index])))))
        for row, pieces in results:
            if row.reason or isinstance(pieces, RunError):
                self.leave(row)
        if not self._ahead and self.rows:
            self._read(self._tokens[: len(self.rows)])
        return results

    def _read(self, tokens: Tensor) -> None:
        """Feed one token to each active row."""
        count = len(tokens)
        self._seen[:count].scatter_(1, tokens[:, None], True)
        if self._counts is not None:
            ones = torch.ones_like(tokens[:, None], dtype=torch.int32)
            self._counts[:count].scatter_add_(1, tokens[:, None], ones)
        if self._ahead:
            size = next(size for size in _sizes(self.num_slots) if size >= count)
            padded = torch.nn.functional.pad(tokens, (0, size - count))
            logits = self._captured(size)(padded)[:count]
        else:
            logits = self._model.step(tokens, self._prefix(count))
        self._logits[:count].copy_(logits)

    def _captured(self, size: int) -> CapturedStep:
        if size not in self._steps:
            self._steps[size] = CapturedStep(self._model, self._prefix(size))
        return self._steps[size]

    def _prefix(self, count: int) -> State:
        """A view of the first rows."""
        return State([layer[:count] for layer in self._state.layers], self._state.position[:count])


def _sizes(num_slots: int) -> list[int]:
    """Batch sizes that are captured: powers of two, so that at most half of a captured batch is padding."""
    return sorted({min(1 << power, num_slots) for power in range(num_slots.bit_length() + 1)})
