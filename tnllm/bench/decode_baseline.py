"""The softmax baseline's decoding step at one fixed position, as fast as torch can run it.

step = FixedStep(model, filled_cache(model, batch, 16384), compiled=True)
logits = step(tokens)          # tokens [B] int64 → logits [B, V] fp32

`LanguageModel.step` grows its cache, which a CUDA graph cannot; timing one position needs no growth. So every row holds
`context` tokens, the new one included; nothing is masked (flash attention splits the keys over all SMs); the layers are
compiled and the step is one CUDA graph: the best a serving engine's step can do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.modeling.model import Block, LanguageModel
from tnllm.modeling.state import State
from tnllm.modeling.transformer import SoftmaxAttention


def filled_cache(model: LanguageModel, batch: int, context: int) -> Tensor:
    """A cache of random keys and values in the model's dtype: [L, 2, B, H, context, d]."""
    config = model.config
    shape = (config.num_layers, 2, batch, config.num_heads, context, config.head_dim)
    return torch.randn(shape, dtype=model.dtype, device=model.device)


def cache_of(state: State) -> Tensor:
    """The cache out of a model's state whose rows all have the same length, with room for one more token."""
    length = int(state.position[0])
    layers = torch.stack([layer[:, :, :length].transpose(0, 1).transpose(2, 3) for layer in state.layers])
    return F.pad(layers, (0, 0, 0, 1))


def _layer(block: Block, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One block for one token per row: x [B, M]; keys and values [B, H, context, d], whose last slot is written."""
    mixer = block.token_mixer
    assert isinstance(mixer, SoftmaxAttention)
    q, k, v = (part[:, 0] for part in mixer.project(block.token_norm(x)[:, None], positions))
    keys[:, :, -1] = k
    values[:, :, -1] = v
    attended = F.scaled_dot_product_attention(q[:, :, None], keys, values)
    x = x + mixer.out_proj(attended.flatten(1))
    return x + block.channel_mixer(block.channel_norm(x))


class FixedStep:
    """The step that writes the last slot of `cache` [L, 2, B, H, context, d] and attends to all of it."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, cache: Tensor, compiled: bool) -> None:
        self._model, self._cache = model, cache
        self._tokens = torch.zeros(cache.shape[2], dtype=torch.int64, device=cache.device)
        self._positions = torch.full((cache.shape[2], 1), cache.shape[4] - 1, device=cache.device)
        self._layer = _layer
        if compiled:
            # Each batch and context is compiled anew; all layers share the code.
            torch._dynamo.reset()
            self._layer = torch.compile(
                _layer, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True}
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        if cache.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._step()
                if cache.shape[2] == 1:
                    torch.argmax(self._logits, dim=-1, out=self._tokens)
            self._graph = graph

    @property
    def top_token(self) -> Tensor | None:
        """[1] argmax of the last call's logits, taken inside the graph; None for several rows and on CPU."""
        return self._tokens if self._graph is not None and len(self._tokens) == 1 else None

    def _step(self) -> Tensor:
        x = self._model.embed_tokens(self._tokens)
        for block, (keys, values) in zip(self._model.blocks, self._cache.unbind(0), strict=True):
            x = self._layer(block, x, self._positions, keys, values)
        return self._model.logits(self._model.final_norm(x))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64 → logits [B, V] fp32, valid until the next call."""
        if tokens is not self._tokens:
            self._tokens.copy_(tokens)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._logits
