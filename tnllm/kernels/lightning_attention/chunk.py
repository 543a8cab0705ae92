"""Lightning Attention in plain torch, chunk by chunk: the form for CPU, and for any device without Triton.

    o, final_state = chunk_forward(q, k, v, log_decay, initial_state, cu_seqlens)
    dq, dk, dv, dinitial = chunk_backward(do, dfinal, q, k, v, log_decay, initial_state, cu_seqlens)

Within a chunk of C tokens attention is a masked matrix product; between chunks only the state S [D, E] is passed on. So
all work but a short loop over chunk states is batched matmuls over all chunks of all heads. With r the row in its chunk,
m the chunk's number of tokens, S the state before it and R the gradient of the state after it (all decays are <= 1):

    o  = (q k^T . M) v      + decay^(r+1) q S               S' = decay^m S + (decay^(m-1-r) k)^T v
    dq = (do v^T . M) k     + decay^(r+1) do S^T            R' = decay^m R + (decay^(r+1) q)^T do
    dk = (do v^T . M)^T q   + decay^(m-1-r) v R^T
    dv = (q k^T . M)^T do   + decay^(m-1-r) k R             M[t, s] = decay^(t-s) for s <= t, else 0

Source: Lightning Attention-2 (arXiv 2401.04658), Algorithms 1 and 2; a ragged last chunk decays by its own m.
Accumulation is float32 (float64 for float64 inputs); results have q's dtype, states that of the accumulation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Maximum tokens per chunk. Work within a chunk grows with C, work on states with D * E / C. Of 16, 32, 64 and 128,
# forward plus backward was fastest at 64 for head dims 64 and 128, and within 7 % of the fastest for 32.
CHUNK = 64


@dataclass(frozen=True)
class _Chunks:
    """How tokens are cut into chunks. Chunks are ordered by wave: the first chunk of every sequence, then the second of
    each, and so on, longest sequence first, so that the loop over states takes one slice per wave."""

    size: int
    num_tokens: int
    waves: list[int]  # number of sequences with a chunk in each wave
    rows: Tensor  # [G] int64, tokens in each of the G chunks
    index: Tensor | None  # [G, C] int64, token of each row, num_tokens for padding; None: not packed
    order: Tensor | None  # [N] int64, sequences from longest to shortest

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] -> [G, H, C, D], zero-padded to full chunks."""
        B, T, H, D = x.shape
        if self.index is None:
            x = F.pad(x, (0, 0, 0, 0, 0, len(self.waves) * self.size - T))
            x = x.view(B, len(self.waves), self.size, H, D).permute(1, 0, 3, 2, 4)
            return x.to(dtype).reshape(-1, H, self.size, D)
        x = F.pad(x[0], (0, 0, 0, 0, 0, 1))[self.index.view(-1)]
        return x.view(-1, self.size, H, D).transpose(1, 2).to(dtype).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[G, H, C, D] -> [B, T, H, D], the inverse of split."""
        H, D = x.shape[1], x.shape[3]
        if self.index is None:
            B = self.waves[0]
            x = x.view(-1, B, H, self.size, D).permute(1, 0, 3, 2, 4).reshape(B, -1, H, D)
            return x[:, : self.num_tokens].to(dtype).contiguous()
        out = x.new_empty(self.num_tokens + 1, H, D, dtype=dtype)
        out[self.index.view(-1)] = x.transpose(1, 2).reshape(-1, H, D).to(dtype)
        return out[None, : self.num_tokens]

    def sort(self, state: Tensor) -> Tensor:
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        if self.order is None:
            return state
        out = torch.empty_like(state)
        out[self.order] = state
        return out


def _lay_out(q: Tensor, cu_seqlens: Tensor | None) -> _Chunks:
    B, T = q.shape[:2]
    if cu_seqlens is None:
        num_waves = -(-T // CHUNK)
        size = -(-T // num_waves)
        num_waves = -(-T // size)
        rows = torch.full((num_waves, B), size)
        rows[-1] = T - (num_waves - 1) * size
        return _Chunks(size, T, [B] * num_waves, rows.view(-1).to(q.device), None, None)
    ends = cu_seqlens.to("cpu", torch.int64)
    lengths = ends.diff()
    if ends[0] != 0 or ends[-1] != T or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {ends.tolist()}")
    size = min(CHUNK, int(lengths.max()))
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = ends[:-1][order]
    waves, counts, index = [], [], []
    for wave in range(-(-int(lengths[0]) // size)):
        count = int((lengths > wave * size).sum())
        position = wave * size + torch.arange(size)
        present = position < lengths[:count, None]
        waves.append(count)
        counts.append(present.sum(1))
        index.append(torch.where(present, starts[:count, None] + position, T))
    rows, flat, order = (x.to(q.device) for x in (torch.cat(counts), torch.cat(index), order))
    return _Chunks(size, T, waves, rows, flat, order)


@dataclass(frozen=True)
class _Decays:
    mask: Tensor  # [H, C, C] decay^(t - s), zero above the diagonal
    query: Tensor  # [H, C, 1] decay^(r + 1)
    key: Tensor  # [G, H, C, 1] decay^(m - 1 - r)
    chunk: Tensor  # [G, H, 1, 1] decay^m


def _decays(log_decay: Tensor, chunks: _Chunks, dtype: torch.dtype) -> _Decays:
    g = log_decay.to(dtype)
    r = torch.arange(chunks.size, device=g.device)
    gap = r[:, None] - r[None, :]
    mask = torch.where(gap >= 0, (g[:, None, None] * gap.clamp(min=0)).exp(), 0.0)
    rows = chunks.rows[:, None, None]
    key = (g[:, None] * (rows - 1 - r).clamp(min=0)).exp()
    query = (g[:, None] * (r + 1)).exp()
    return _Decays(mask, query[..., None], key[..., None], (g[:, None] * rows).exp()[..., None])


def _states_before(update: Tensor, decays: _Decays, chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Turn what each chunk adds to the state [G, H, D, E] into the state before it, in place; also return the last."""
    state = chunks.sort(state).clone()
    start = 0
    for count in chunks.waves:
        here = slice(start, start + count)
        after = torch.addcmul(update[here], state[:count], decays.chunk[here])
        update[here] = state[:count]
        state[:count] = after
        start += count
    return update, chunks.unsort(state)


def _gradients_after(update: Tensor, decays: _Decays, chunks: _Chunks, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same reversed in time: the gradient of the state after each chunk, and of the initial state."""
    grad = chunks.sort(grad).clone()
    end = len(update)
    for count in reversed(chunks.waves):
        here = slice(end - count, end)
        before = torch.addcmul(update[here], grad[:count], decays.chunk[here])
        update[here] = grad[:count]
        grad[:count] = before
        end -= count
    return update, chunks.unsort(grad)


def check_decay(log_decay: Tensor) -> None:
    """Raise ValueError unless every value is finite and <= 0. For tensors on CPU: on a GPU it would synchronise."""
    if not bool(((log_decay <= 0) & log_decay.isfinite()).all()):
        raise ValueError(f"log_decay must be finite and <= 0, got {log_decay.tolist()}")


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[_Chunks, _Decays, Tensor, Tensor, Tensor, Tensor]:
    check_decay(log_decay)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunks = _lay_out(q, cu_seqlens)
    if state is None:
        num_seqs = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = q.new_zeros(num_seqs, *q.shape[2:], v.shape[-1], dtype=dtype)
    qc, kc, vc = (chunks.split(x, dtype) for x in (q, k, v))
    return chunks, _decays(log_decay, chunks, dtype), qc, kc, vc, state


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public function; the final state is a new contiguous tensor."""
    chunks, decays, qc, kc, vc, state = _prepare(q, k, v, log_decay, initial_state, cu_seqlens)
    o = (qc @ kc.mT).mul_(decays.mask) @ vc
    before, final = _states_before((kc * decays.key).mT @ vc, decays, chunks, state)
    o += (qc * decays.query) @ before
    return chunks.join(o, v.dtype), final


def chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state, given those of o and (or None) of the final state."""
    chunks, decays, qc, kc, vc, state = _prepare(q, k, v, log_decay, initial_state, cu_seqlens)
    doc = chunks.split(do, qc.dtype)
    before, _ = _states_before((kc * decays.key).mT @ vc, decays, chunks, state)
    do_decayed = doc * decays.query
    dstate = torch.zeros_like(state) if dfinal is None else dfinal
    after, dinitial = _gradients_after(qc.mT @ do_decayed, decays, chunks, dstate)

    scores = (doc @ vc.mT).mul_(decays.mask)
    dq = scores @ kc
    dq += do_decayed @ before.mT
    dk = scores.mT @ qc
    dk += (vc * decays.key) @ after.mT
    scores = torch.matmul(qc, kc.mT, out=scores).mul_(decays.mask)
    dv = scores.mT @ doc
    dv += (kc * decays.key) @ after
    return chunks.join(dq, q.dtype), chunks.join(dk, k.dtype), chunks.join(dv, v.dtype), dinitial


def chunk_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, D], v [B, H, E] -> o [B, H, E]; the state [B, H, D, E] is updated in place."""
    check_decay(log_decay)
    dtype = state.dtype
    # S + ((decay - 1) S + k v^T), not decay S + k v^T: the slowest decays are 1 - 4e-8, which float32 rounds to 1 - 6e-8,
    # so that over a million steps the state would decay half as fast again as it should.
    change = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    state.add_(change.addcmul_(state, log_decay.to(dtype).expm1()[:, None, None]))
    return (q.to(dtype)[..., None, :] @ state).squeeze(-2).to(v.dtype)
