"""The rows a server decodes: a fixed number of slots in one state tensor, joined and left between any two steps.

slots = Slots(model, tokenizer, 64)
slots.join(row, context)            # a copy of the context becomes the row's state
for row, pieces in slots.decode(ends):
    ...                             # a few more tokens of each row; rows with a reason have left

Active rows are always the first ones: a row that leaves is overwritten by the last one. So a step runs on a prefix
of the tensors, without gaps and without allocating states. On a GPU prefixes of a few sizes are captured as
CUDA graphs once, and the rows beyond the active ones compute nothing that is used.
"""

import torch
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.generation.captured_step import MIN_STEPS, CapturedStep, can_capture
from tnllm.generation.context import Context
from tnllm.generation.decoder import SYNC_EVERY
from tnllm.generation.sampler import Options
from tnllm.generation.samples import Drawn, Piece, Row, draw, most_logprobs, non_finite
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
        self._counts: Tensor | None = None  # [slots, V] from the first row on that needs it
        self._options: Options | None = None  # of the active rows; None after one joined or left
        self._tokens = torch.zeros(num_slots, dtype=torch.int64, device=model.device)  # drawn last
        self._ahead = can_capture(model, MIN_STEPS)
        self._steps: dict[int, CapturedStep] = {}
        self.rows: list[Row] = []
        self.num_slots = num_slots

    @property
    def free(self) -> int:
        """Slots nobody is in."""
        return self.num_slots - len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, used or not."""
        counts = self._counts.nbytes if self._counts is not None else 0
        return self._state.nbytes + self._logits.nbytes + self._seen.nbytes + counts

    def warm_up(self) -> None:
        """Capture every size now rather than when a request waits for it. Nothing to do on a CPU."""
        if self._ahead:
            for size in _sizes(self.num_slots):
                self._captured(size)

    @torch.no_grad()
    def join(self, row: Row, context: Context) -> None:
        """Put a row into a free slot, after `context`, which is copied."""
        place = len(self.rows)
        assert place < self.num_slots
        for layer, own in zip(self._state.layers, context.state.layers, strict=True):
            layer[place].copy_(own[0])
        self._state.position[place] = context.state.position[0]
        self._logits[place].copy_(context.logits[0])
        self._seen[place].copy_(context.seen[0])
        if row.params.presence_penalty or row.params.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(self._seen, dtype=torch.int32)
            self._counts[place].zero_()
        self.rows.append(row)
        self._options = None

    @torch.no_grad()
    def leave(self, row: Row) -> None:
        """Free a row's slot."""
        place = next(place for place, other in enumerate(self.rows) if other is row)
        last = len(self.rows) - 1
        if place != last:
            tensors = [*self._state.layers, self._state.position, self._logits, self._seen, self._tokens]
            for tensor in [*tensors, self._counts] if self._counts is not None else tensors:
                tensor[place].copy_(tensor[last])
            self.rows[place] = self.rows[last]
        self.rows.pop()
        self._options = None

    @torch.no_grad()
    def decode(self, ends: frozenset[int]) -> list[tuple[Row, list[Piece] | RunError]]:
        """A few more tokens of every row (one on a CPU), with one wait for the device; rows that end leave.

        A row whose logits are not finite leaves with an error in place of its pieces; the others go on.
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
                draw(
                    self._logits[:count], self._options, self._state.position[:count], self._seen[:count], counts,
                    self._tokenizer.vocab_size, num_top,
                )
            )  # fmt: skip
        self._tokens[:count].copy_(columns[-1][0])
        if self._ahead:
            # The device computes while the host looks; what rows that have ended compute is for nobody.
            self._read(self._tokens[:count])
        drawn = Drawn.of(columns)
        found: list[tuple[Row, list[Piece] | RunError]] = []
        for place, row in enumerate(rows):
            # Past its last token a row may be anything.
            if all(drawn.finite[place][: row.left]):
                found.append((row, list(row.take_all(drawn, place, ends, self._tokenizer))))
            else:
                found.append((row, RunError(non_finite(int(self._state.position[place])))))
        for row, pieces in found:
            if row.reason or isinstance(pieces, RunError):
                self.leave(row)
        if not self._ahead and self.rows:
            self._read(self._tokens[: len(self.rows)])
        return found

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
        """The first rows, sharing memory with all."""
        return State([layer[:count] for layer in self._state.layers], self._state.position[:count])


def _sizes(num_slots: int) -> list[int]:
    """Batch sizes that are captured: powers of two, so that at most half of a step is for nobody."""
    return sorted({min(1 << power, num_slots) for power in range(num_slots.bit_length() + 1)})
