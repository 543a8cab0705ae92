"""The decoding step on a CPU as a flat list of operators on buffers, made once: a small model's step is bound by Python.

    step = cpu_step(model, state)        # None if the model is of another form
    logits = step(tokens)                # as model.step(tokens, state), valid until the next call

    chunk = cpu_step(model, state, consecutive=True)
    logits = chunk(tokens)               # of tokens [T] that follow row 0 of the state, which stays as it is
    chunk.advance(3)                     # the state after the first 3 of them: exact, for no further product of matrices

The released form needs 17 operators a layer, each a few microseconds besides its arithmetic; by modules there are 40, and
some of them are Python. `pack_weights` lays the matrices out as one row reads them fastest.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.modeling.int8 import Int8Linear
from tnllm.modeling.layers import LRPE, RMSNorm, SRMSNorm
from tnllm.modeling.model import Block, LanguageModel
from tnllm.modeling.state import State

_ACTIVATIONS: dict[str, Callable[[Tensor], Any] | None] = {
    "none": None,
    "silu": torch.ops.aten.silu_.default,
    "relu": torch.relu_,
    "1+elu": lambda x: F.elu_(x).add_(1.0),
}


@torch.no_grad()
def pack_weights(model: LanguageModel) -> None:
    """Store matrices input by input where they have more outputs than inputs, and the two up projections as one.

    Values, shapes and the memory needed stay as they are. One row times a matrix of 1,024 x 256 then takes half the time.
    Does nothing in bfloat16, whose product from this layout takes ten times as long, and in int8.
    """
    if model.is_int8 or model.dtype == torch.bfloat16:
        return
    for block in model.blocks:
        mixer: Any = block.channel_mixer
        if type(mixer.l1) is type(mixer.l2) is nn.Linear:
            both = torch.cat([mixer.l1.weight, mixer.l2.weight]).t().contiguous()
            mixer.l1.weight.data, mixer.l2.weight.data = (half.t() for half in both.chunk(2, dim=1))
    module: Any
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.is_contiguous():
            is_wide = len(module.weight) >= module.weight.shape[1]
            if is_wide and (type(module) is nn.Linear or module.weight is model.head_weight):
                module.weight.data = module.weight.data.t().contiguous().t()


def cpu_step(
    model: LanguageModel, state: State, logits: Tensor | None = None, consecutive: bool = False
) -> "CpuStep | None":
    """The step for `state`, or None if this form does not cover the model or is not for its device.

    It writes into the first rows of `logits` [rows of the state, V] if given. consecutive: for a chunk of row 0.
    """
    config = model.config
    plain = all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    # Rounded to bfloat16 at other points than in a chunk, logits would differ visibly from the chunk's.
    covered = model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)
    covered = covered and not config.num_softmax and config.position != "ape"
    return CpuStep(model, state, logits, consecutive) if covered and plain else None


class CpuStep:
    """`model.step` for the first rows of one `state` of constant size, which it updates in place; or see `cpu_step`."""

    def __init__(self, model: LanguageModel, state: State, logits: Tensor | None, consecutive: bool) -> None:
        self._model, self._state, self._all_logits = model, state, logits
        self._consecutive = consecutive
        self._rows = 0
        self._operators: list[Callable[[], Any]] = []
        # Of a chunk, by layer: log-decays [H, 1, 1], keys [H, T, D], values [H, T, E] and the state [H, D, E].
        self._changes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64, of the state's first B rows → logits [B, V] fp32, valid until the next call.

        With `consecutive`, of row 0, one after the other; the state stays as it is.
        """
        if len(tokens) != self._rows:
            self._rows = len(tokens)
            self._bind(self._rows)
        # The quickest mode: a call costs a fifth less than under no_grad.
        with torch.inference_mode():
            self._embed(tokens)
            for operator in self._operators:
                operator()
        return self._logits

    def advance(self, count: int) -> None:
        """Move row 0 over the first `count` tokens of the last chunk."""
        back = torch.arange(count - 1, -1, -1)[:, None]
        with torch.inference_mode():
            for log_decay, k, v, state in self._changes:
                decayed = k[:, :count] * (log_decay * back).exp().to(self._dtype)
                # As the step, and for its reason.
                change = state * (log_decay * count).expm1().to(self._dtype)
                state.add_(change.baddbmm_(decayed.mT, v[:, :count]))
            self._state.position[0] += count

    def _embed(self, tokens: Tensor) -> None:
        config = self._model.config
        scale = math.sqrt(config.model_dim) if config.scale_embedding else 1.0
        torch.mul(self._model.embed_tokens(tokens), scale, out=self._x)

    def _add(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._operators.append(partial(function, *args, **kwargs))

    def _bind(self, rows: int) -> None:
        """List the operators for this many rows."""
        model, config = self._model, self._model.config
        self._dtype = model.dtype
        self._operators, self._changes = [], []
        width = config.model_dim
        self._x, self._x_and_eps = self._norm_buffer(rows)
        self._normed = self._buffer(rows, width)
        self._logits = self._buffer(rows, config.vocab_size) if self._all_logits is None else self._all_logits[:rows]
        self._root, self._zero = self._buffer(rows, 1), torch.zeros(1, dtype=self._dtype)
        position = self._state.position[:rows]
        if self._consecutive:
            first, position = position[:1], torch.empty(rows, dtype=torch.int64)
            self._add(torch.add, first, torch.arange(rows), out=position)
        for block, layer in zip(model.blocks, self._state.layers, strict=True):
            self._bind_mixer(block, layer[:rows], position)
            self._bind_channels(block)
        self._bind_norm(model.final_norm, self._x, self._x_and_eps, self._normed)
        self._bind_product(model.head, self._normed, self._logits)
        if not self._consecutive:
            self._add(position.add_, 1)

    def _buffer(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self._dtype)

    def _norm_buffer(self, rows: int) -> tuple[Tensor, Tensor]:
        """A buffer [B, M], and with a last column of sqrt(M eps), so that the norm of a row is the root that divides it."""
        width = self._model.config.model_dim
        both = self._buffer(rows, width + 1)
        both[:, width] = math.sqrt(self._model.config.norm_eps * width)
        return both[:, :width], both

    def _bind_product(self, linear: nn.Module, x: Tensor, out: Tensor) -> None:
        """out = linear(x)."""
        if isinstance(linear, Int8Linear):
            self._add(lambda: torch.mul(linear.sums(x), linear.scale, out=out))
        else:
            weight: Any = linear.weight
            self._add(torch.mm, x, weight.t(), out=out)

    def _bind_sum(self, linear: nn.Module, x: Tensor) -> None:
        """Add linear(x) to the residual stream."""
        if isinstance(linear, Int8Linear):
            self._add(lambda: self._x.addcmul_(linear.sums(x), linear.scale))
        else:
            weight: Any = linear.weight
            self._add(self._x.addmm_, x, weight.t())

    def _bind_norm(self, norm: nn.Module, x: Tensor, x_and_eps: Tensor, out: Tensor) -> None:
        """out = norm(x) [B, M]: sqrt(M) x / sqrt(|x|^2 + M eps), times a weight if there is one; see `_norm_buffer`."""
        if not isinstance(norm, SRMSNorm | RMSNorm):
            self._add(lambda: out.copy_(norm(x)))
            return
        self._add(torch.linalg.vector_norm, x_and_eps, 2, -1, True, out=self._root)
        self._add(torch.addcdiv, self._zero, x, self._root, value=math.sqrt(x.shape[-1]), out=out)
        if isinstance(norm, RMSNorm):
            self._add(out.mul_, norm.weight)

    def _bind_activation(self, x: Tensor, kind: str) -> None:
        function = _ACTIVATIONS[kind]
        if function is not None:
            self._add(function, x)

    def _bind_mixer(self, block: Block, state: Tensor, position: Tensor) -> None:
        mixer: Any = block.token_mixer
        config, rows = self._model.config, len(self._x)
        heads, width = config.num_heads, config.model_dim
        self._bind_norm(block.token_norm, self._x, self._x_and_eps, self._normed)
        parts = 4 if config.gate == "full" else 3
        projected = self._buffer(rows, parts * width)
        self._bind_product(mixer.qkvu_proj if parts == 4 else mixer.qkv_proj, self._normed, projected)
        q, k, v = projected[:, : 3 * width].view(rows, 3, heads, config.head_dim).unbind(1)
        gate = projected[:, 3 * width :] if parts == 4 else None
        if config.gate == "low-rank":
            low, gate = self._buffer(rows, config.gate_dim), self._buffer(rows, width)
            self._bind_product(mixer.output_gate[0], self._normed, low)
            self._bind_product(mixer.output_gate[1], low, gate)
            self._add(gate.sigmoid_)
        self._bind_activation(projected[:, : 2 * width], config.activation)
        self._bind_activation(v, config.value_activation)
        if mixer.lrpe is not None:
            q, k = self._bind_lrpe(mixer.lrpe, projected[:, : 2 * width], position).unbind(1)
        attended, attended_and_eps = self._norm_buffer(rows)
        by_head = attended.unflatten(-1, (heads, 1, -1))
        if self._consecutive:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            self._bind_chunk(mixer.log_decay.double()[:, None, None], q, k, v, state[0], by_head)
        else:
            # As chunk_step, and for its reason: S + ((decay - 1) S + k v^T).
            change = torch.empty_like(state)
            self._add(torch.mul, k[..., None], v[:, :, None], out=change)
            self._add(change.addcmul_, state, mixer.log_decay.to(self._dtype).expm1()[:, None, None])
            self._add(state.add_, change)
            if rows == 1:
                self._add(torch.bmm, q.reshape(heads, 1, -1), state[0], out=by_head[0])
            else:
                self._add(torch.matmul, q[:, :, None], state, out=by_head)
        self._bind_output(mixer, attended, attended_and_eps, gate)

    def _bind_chunk(self, log_decay: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor) -> None:
        """out [T, H, 1, E] of q, k [H, T, D] and v [H, T, E] after `state` [H, D, E]; log_decay [H, 1, 1]."""
        heads, rows, _ = q.shape
        index = torch.arange(rows)
        distance = index[:, None] - index
        weights = (log_decay * distance.clamp(min=0)).exp().where(distance >= 0, 0.0).to(self._dtype)
        scores, attended = self._buffer(heads, rows, rows), self._buffer(heads, rows, v.shape[-1])
        decayed = self._buffer(*q.shape)
        self._add(torch.bmm, q, k.mT, out=scores)
        self._add(scores.mul_, weights)
        self._add(torch.bmm, scores, v, out=attended)
        self._add(torch.mul, q, (log_decay * (index[:, None] + 1)).exp().to(self._dtype), out=decayed)
        self._add(attended.baddbmm_, decayed, state)
        self._add(out.copy_, attended.transpose(0, 1)[:, :, None])
        self._changes.append((log_decay, k, v, state))

    def _bind_output(self, mixer: Any, attended: Tensor, attended_and_eps: Tensor, gate: Tensor | None) -> None:
        norm_after = self._model.config.norm_position
        if norm_after == "attention":
            self._bind_norm(mixer.norm, attended, attended_and_eps, attended)
        if gate is not None:
            self._add(attended.mul_, gate)
        if norm_after == "gate":
            self._bind_norm(mixer.norm, attended, attended_and_eps, attended)
        if norm_after == "output":
            y, y_and_eps = self._norm_buffer(len(attended))
            self._bind_product(mixer.out_proj, attended, y)
            self._bind_norm(mixer.norm, y, y_and_eps, y)
            self._add(self._x.add_, y)
        else:
            self._bind_sum(mixer.out_proj, attended)

    def _bind_lrpe(self, lrpe: LRPE, qk: Tensor, position: Tensor) -> Tensor:
        """The activated q and k [B, 2M], rotated: [B, 2, H, 2d]."""
        heads, _, dim = lrpe.theta.shape
        rows = len(qk)
        angle = torch.empty(rows, heads, dim, dtype=torch.float64)
        turn, rotated = self._buffer(rows, 1, heads, dim), self._buffer(rows, 2, heads, 2 * dim)
        halves = rotated.split(dim, dim=-1)
        self._add(torch.mul, position[:, None, None], lrpe.theta[:, 0].double(), out=angle)
        for function, half in zip((torch.cos, torch.sin), halves, strict=True):
            self._add(function, angle[:, None], out=turn)
            self._add(torch.mul, qk.view(rows, 2, heads, dim), turn, out=half)
        return rotated

    def _bind_channels(self, block: Block) -> None:
        mixer: Any = block.channel_mixer
        rows, width = len(self._x), self._model.config.glu_dim
        self._bind_norm(block.channel_norm, self._x, self._x_and_eps, self._normed)
        both = self._buffer(rows, 2 * width)
        a, b = both.chunk(2, dim=-1)
        first, second = (getattr(linear, "weight", None) for linear in (mixer.l1, mixer.l2))
        if (
            first is not None
            and second is not None
            and first.stride() == second.stride() == (1, 2 * width)
            and second.data_ptr() == first[0].data_ptr() + both[0, :width].nbytes
        ):
            self._add(torch.mm, self._normed, first.as_strided((first.shape[1], 2 * width), (2 * width, 1)), out=both)
        else:
            self._bind_product(mixer.l1, self._normed, a)
            self._bind_product(mixer.l2, self._normed, b)
        self._bind_activation(a, mixer.activation)
        product = self._buffer(rows, width)
        self._add(torch.mul, a, b, out=product)
        self._bind_sum(mixer.l3, product)
