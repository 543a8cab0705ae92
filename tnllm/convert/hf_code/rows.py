"""Which columns of a batch [B, T] are tokens, and where a text begins inside a row.

    keep = padding_mask(attention_mask, batch, columns)                  # [B, T] bool, None: all
    starts = packed_starts(position_ids, cu_seq_lens, seq_idx, keep, start, (batch, columns))    # [B, T] bool, None: none
    rows, positions, end = find_rows(keep, starts, start, (batch, columns))

Callers say it in several ways: transformers' padding-free collators restart position_ids at 0, and may add the offsets of
FlashAttention (cu_seq_lens_q, cu_seq_lens_k) and Mamba's seq_idx. transformers' own `generate` passes position_ids with any
value at padding. So a restart counts only between tokens, and what neither continues nor restarts is refused.

Under torch.compile and torch.export nothing here depends on values: they are taken as they are, unchecked.
"""

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.convert.hf_code.state import TnllmState


class Rows:
    """Padding and texts of a batch [B, T]: what Lightning Attention needs to know beside the tokens.

    keep [B, T] bool: tokens, not padding. text [B, T] int64: how many texts have begun in the row; 0 continues its state.
    """

    def __init__(self, keep: Tensor, text: Tensor) -> None:
        self.keep, self.text = keep, text
        self.count = keep.cumsum(-1)
        if torch.compiler.is_compiling() or keep.is_meta:
            return
        # As one packed row: every row has a sequence for what continues its state, which may be empty, and one per text.
        texts = text[:, -1] + 1
        self.last = texts.cumsum(0) - 1
        self.first = self.last - text[:, -1]
        self.index = keep.flatten().nonzero()[:, 0]
        sequence = (self.first[:, None] + text).flatten()[self.index]
        lengths = torch.bincount(sequence, minlength=int(texts.sum()))
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Rows":
        """The same on another device: accelerate moves a block's arguments where the block is."""
        moved = copy(self)
        moved.__dict__ = {name: value.to(device, non_blocking=non_blocking) for name, value in self.__dict__.items()}
        return moved

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, H, D] → [1, tokens, H, D]."""
        return x.flatten(0, 1)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, tokens, H, D] → [B, T, H, D], zeros at padding."""
        flat = x.new_zeros(self.keep.numel(), *x.shape[2:])
        return flat.index_copy(0, self.index, x[0]).unflatten(0, self.keep.shape)

    def initial(self, state: Tensor) -> Tensor:
        """States of the rows [B, ...] → of the sequences [N, ...]: a text that begins here has none."""
        states = state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:])
        return states.index_copy(0, self.first, state)


def padding_mask(attention_mask: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """[B, T] bool of the new columns, False at padding; None if there is no padding. Raises ValueError."""
    if attention_mask is None:
        return None
    shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    if isinstance(shape, str) or len(shape) != 2 or shape[0] != batch or shape[1] < columns:
        raise ValueError(f"attention_mask must end in {[batch, columns]}; got {shape}")
    mask = attention_mask[:, -columns:]
    if torch.compiler.is_compiling() or mask.is_meta:
        return mask.bool()
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must be 0 at padding and 1 elsewhere; give texts in one row by position_ids")
    return None if bool(mask.all()) else mask.bool()


def packed_starts(
    position_ids: Tensor | None,
    cu_seq_lens: tuple[Tensor | None, Tensor | None],
    seq_idx: Tensor | None,
    keep: Tensor | None,
    start: Tensor,
    shape: tuple[int, int],
) -> Tensor | None:
    """[B, T] bool, True where a text begins; None if no argument says so. `start` [B]: tokens that the state has read.

    Raises ValueError for positions that neither continue nor restart, and for callers that contradict themselves.
    """
    keep = torch.ones(shape, dtype=torch.bool, device=start.device) if keep is None else keep
    said = {
        "position_ids": None if position_ids is None else _from_positions(position_ids, keep, start),
        "cu_seq_lens_q": _from_offsets(cu_seq_lens[0], keep, start),
        "cu_seq_lens_k": _from_offsets(cu_seq_lens[1], keep, start),
        "seq_idx": None if seq_idx is None else _from_indices(seq_idx, keep),
    }
    starts: Tensor | None = None
    first = ""
    for name, value in said.items():
        if value is None:
            continue
        if starts is None:
            starts, first = value, name
        elif not torch.compiler.is_compiling() and not torch.equal(starts, value):
            raise ValueError(f"{first} and {name} disagree about where texts begin; give one of them")
    return starts


def _is_first(keep: Tensor) -> Tensor:
    return keep & (keep.cumsum(-1) == 1)


def _before(x: Tensor, keep: Tensor) -> Tensor:
    """For each column the value of x at the last token before it (the first column: its own)."""
    columns = torch.arange(keep.shape[1], device=keep.device)
    last = torch.where(keep, columns, 0).cummax(-1).values
    return x.gather(1, F.pad(last[:, :-1], (1, 0)))


def _from_positions(position_ids: Tensor, keep: Tensor, start: Tensor) -> Tensor:
    if (
        position_ids.ndim != 2
        or position_ids.shape[1] != keep.shape[1]
        or position_ids.shape[0] not in (1, keep.shape[0])
    ):
        raise ValueError(f"position_ids must be {list(keep.shape)}; got {list(position_ids.shape)}")
    positions = position_ids.expand(keep.shape).to(torch.int64)
    first = _is_first(keep)
    restart = keep & (positions == 0) & (~first | (start > 0)[:, None])
    if not torch.compiler.is_compiling():
        expected = torch.where(first, start[:, None], _before(positions, keep) + 1)
        wrong = keep & ~restart & (positions != expected)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            continues = f"{int(expected[row, column])}, which continues, or " * bool(expected[row, column])
            raise ValueError(
                f"position_ids[{row}, {column}] is {int(positions[row, column])}; it must be {continues}"
                "0, where a text begins"
            )
    return restart


def _from_offsets(offsets: Tensor | None, keep: Tensor, start: Tensor) -> Tensor | None:
    if offsets is None:
        return None
    if keep.shape[0] != 1 or offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"cu_seq_lens must be [N + 1] and the batch 1; got {list(offsets.shape)} and {keep.shape[0]} rows"
        )
    offsets = offsets.to(keep.device, torch.int64)
    if not torch.compiler.is_compiling():
        ends = offsets.tolist()
        if ends[0] != 0 or ends[-1] != keep.shape[1] or sorted(ends) != ends:
            raise ValueError(f"cu_seq_lens must rise from 0 to {keep.shape[1]}; got {ends}")
        if bool((start > 0).any()):
            raise ValueError("cu_seq_lens begins a text, so past_key_values must not have read any; leave it out")
    begins = torch.zeros(keep.shape[1] + 1, dtype=torch.int64, device=keep.device).index_fill(0, offsets, 1)
    # Where padding stands at an offset, the text begins with the next token.
    texts = begins[None, :-1].cumsum(-1)
    return keep & (texts != _before(texts, keep)) & ~_is_first(keep)


def _from_indices(seq_idx: Tensor, keep: Tensor) -> Tensor:
    if seq_idx.shape != keep.shape:
        raise ValueError(f"seq_idx must be {list(keep.shape)}; got {list(seq_idx.shape)}")
    return keep & (seq_idx != _before(seq_idx, keep)) & ~_is_first(keep)


def continued_positions(position_ids: Tensor, keep: Tensor) -> Tensor:
    """position_ids [1 or B, T] in which the tokens after a row's last padding continue those before it.

    `generate` counts on from the last column, and with padding on the right that column's position means nothing.
    """
    positions = position_ids.expand(keep.shape).clone()
    columns = torch.arange(keep.shape[1], device=keep.device)
    # The first column after the last padding, if tokens lie before and after that.
    tail = torch.where(keep, -1, columns).max(-1, keepdim=True).values + 1
    has_both = (keep & (columns < tail)).any(-1, keepdim=True) & (tail < keep.shape[1])
    tail = tail.clamp(max=keep.shape[1] - 1)
    gap = _before(positions, keep).gather(1, tail) + 1 - positions.gather(1, tail)
    return positions + torch.where(has_both & (columns >= tail), gap, 0)


def find_rows(
    keep: Tensor | None, starts: Tensor | None, start: Tensor, shape: tuple[int, int]
) -> tuple[Rows | None, Tensor, Tensor]:
    """The rows (None: B texts without padding that continue their states), positions [B, T], and the next position [B]."""
    columns = torch.arange(shape[1], device=start.device)
    if starts is not None and not torch.compiler.is_compiling() and not bool(starts.any()):
        starts = None
    if keep is None and starts is None:
        return None, start[:, None] + columns, start + shape[1]
    keep = torch.ones(shape, dtype=torch.bool, device=start.device) if keep is None else keep
    starts = torch.zeros_like(keep) if starts is None else starts
    text = starts.cumsum(-1)
    offset = keep.cumsum(-1) - 1
    begun = torch.where(starts, offset, 0).cummax(-1).values
    positions = offset - begun + torch.where(text == 0, start[:, None], 0)
    return Rows(keep, text), positions.clamp(min=0), positions[:, -1] + 1


def softmax_mask(rows: Rows | None, state: TnllmState | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For softmax attention: which columns each new one attends to, [B, T, S + T] bool, and the state's next `visible`.

    x [B, T, M]: the new columns. A mask of None is plain causal attention.
    """
    if rows is None and state is None:
        return None, None
    batch, columns = x.shape[:2]
    visible = None if state is None else state.visible
    if visible is None:
        visible = torch.zeros(batch, 0, dtype=torch.bool, device=x.device)
    if rows is None:
        keep = torch.ones(batch, columns, dtype=torch.bool, device=visible.device)
        text = torch.zeros_like(keep, dtype=torch.int64)
    else:
        keep, text = rows.keep, rows.text
    earlier = visible[:, None] & (text == 0)[..., None]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=visible.device).tril()
    same = causal & (text[..., None] == text[:, None]) & keep[:, None]
    # Padding attends to itself: a softmax over nothing is NaN.
    own = torch.eye(columns, dtype=torch.bool, device=visible.device)
    last = text[:, -1:]
    after = torch.cat([visible & (last == 0), keep & (text == last)], dim=1)
    return torch.cat([earlier, same | own], dim=2), after


def last_real(keep: Tensor) -> Tensor:
    """[B, T] int64: the last token up to each column, or the column itself before the first token."""
    columns = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep.cumsum(-1) > 0, torch.where(keep, columns, 0).cummax(-1).values, columns)
