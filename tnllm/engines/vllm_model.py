"""TransNormerLLM in vLLM: this package's layers, with states in vLLM's cache instead of passed and returned.

vLLM keeps a page for each running text and each state layer, and lends pages as it does key-value blocks; for prefix
caching it keeps those at block boundaries. LRPE's keys are twice as wide, so their matrix is kept as two states of the
common size, one for the cosines and one for the sines: all pages are then equal, and none is padded.

The softmax layers of a hybrid keep keys and values in vLLM's blocks. vLLM makes these as large as a state or larger.

Tensor parallelism is that of training: `shard_heads` replaces parameters and adds the all-reduces.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, IsHybrid, SupportsMambaPrefixCaching
from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionBackend, Mamba1AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from tnllm.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.config import ModelConfig, make_config
from tnllm.modeling.hf_names import HEAD, IGNORED, from_hf_config, from_official
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.transformer import SoftmaxAttention
from tnllm.parallel.layout import Layout
from tnllm.parallel.tensor import shard_heads


class Metadata(Mamba1AttentionMetadataBuilder):
    """Splits a batch in decoding steps, which come first, and prefills."""

    needs_causal_conv1d_metadata = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **_: Any) -> Any:
        """One token is a step, also of a prompt: CUDA graphs are chosen by shapes, and see by position 0 what is fresh."""
        several = common_attn_metadata.query_start_loc_cpu.diff() > 1
        prefilling = common_attn_metadata.is_prefilling & several
        return self._compute_common_metadata(common_attn_metadata.replace(is_prefilling=prefilling))


class Backend(Mamba1AttentionBackend):
    """What vLLM asks for by layer."""

    @staticmethod
    def get_name() -> str:
        return "TNLLM"

    @staticmethod
    def get_builder_cls() -> type[Metadata]:
        return Metadata


class StateLayer(MambaBase):
    """A matrix [H, d, d] in fp32 for each text: a layer to vLLM, which sets `kv_cache` to one tensor [pages, H, d, d]."""

    def __init__(self, shape: tuple[int, ...], name: str, vllm_config: Any) -> None:
        self.shape, self.name, self.kv_cache = shape, name, (torch.empty(0),)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Whatever the weights are: a sum over a whole text needs it."""
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """A backend of vLLM's with pages of the same life."""
        return MambaAttentionBackendEnum.MAMBA1

    def get_attn_backend(self) -> type[Backend]:
        return Backend


class CachedAttention(GatedLinearAttention):
    """The token mixer over one row of packed tokens, with states in vLLM's cache."""

    def __init__(self, config: ModelConfig, layer: int, vllm_config: Any, tensor_size: int, prefix: str) -> None:
        super().__init__(config, layer)
        shape = (config.num_heads // tensor_size, config.head_dim, config.head_dim)
        parts = ("cos", "sin") if self.lrpe is not None else ("state",)
        self.states = [StateLayer(shape, f"{prefix}layers.{layer}.{part}", vllm_config) for part in parts]

    def forward(self, x: Tensor, positions: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """x [1, T, M], positions [1, T] → y [1, T, M]; states are read and written in place, so none is returned."""
        q, k, v, gate = self._project(x, positions)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            return self._output(self.attend(q, k, v, self.log_decay, None), gate), None
        attended = torch.zeros_like(v)
        batches = [metadata[layer.name] for layer in self.states]
        steps, total = batches[0].num_decode_tokens, batches[0].num_prefill_tokens
        if steps:
            rows = [batch.state_indices_tensor_d[:steps, 0] for batch in batches]
            fresh = positions[0, :steps] == 0
            attended[0, :steps] = self._step(q[0, :steps], k[0, :steps], v[0, :steps], rows, fresh)
        if total:
            rows = [batch.state_indices_tensor_p for batch in batches]
            before = self._read(rows, ~batches[0].has_initial_states_p)
            texts = batches[0].query_start_loc_p
            q, k, v = (part[:, steps : steps + total] for part in (q, k, v))
            attended[:, steps : steps + total], after = lightning_attention(q, k, v, self.log_decay, before, texts)
            self._write(rows, after)
        return self._output(attended, gate), None

    def _step(self, q: Tensor, k: Tensor, v: Tensor, rows: list[Tensor], fresh: Tensor) -> Tensor:
        """q, k [B, H, D], v [B, H, E] → o [B, H, E]. On CUDA states stay where they are, and nothing waits for the host."""
        if q.is_cuda:
            from tnllm.kernels.lightning_attention.step import triton_step

            # The halves of LRPE's keys add up in fp32.
            wide = v if len(self.states) == 1 else v.float()
            halves = zip(q.chunk(len(rows), -1), k.chunk(len(rows), -1), self.states, rows, strict=True)
            parts = [triton_step(a, b, wide, self.log_decay, at.kv_cache[0], row, fresh) for a, b, at, row in halves]
            return torch.stack(parts).sum(0).to(v.dtype)
        state = self._read(rows, fresh)
        attended = lightning_attention_step(q, k, v, self.log_decay, state)
        self._write(rows, state)
        return attended

    def _read(self, rows: list[Tensor], fresh: Tensor) -> Tensor:
        """[B, H, D, E]; zero where a text is fresh, whatever its page held before."""
        parts = [layer.kv_cache[0][row.long()] for layer, row in zip(self.states, rows, strict=True)]
        return torch.cat(parts, 2).masked_fill(fresh[:, None, None, None], 0.0)

    def _write(self, rows: list[Tensor], state: Tensor) -> None:
        for layer, row, part in zip(self.states, rows, state.chunk(len(rows), 2), strict=True):
            layer.kv_cache[0][row.long()] = part


class PagedAttention(SoftmaxAttention):
    """Softmax attention over one row of packed tokens, with keys and values in vLLM's cache."""

    def attach(self, vllm_config: Any, tensor_size: int, name: str) -> None:
        """Become a layer to vLLM, whose scales, which it fills itself, are allocated here: not on the meta device."""
        heads, width = self.config.num_heads // tensor_size, self.config.head_dim
        self.cached = Attention(heads, width, width**-0.5, cache_config=vllm_config.cache_config, prefix=name)

    def forward(self, x: Tensor, positions: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """x [1, T, M], positions [1, T] → y [1, T, M]; the cache is read and written in place."""
        attended = self.cached(*(part[0].flatten(-2) for part in self.project(x, positions)))
        return self.out_proj(attended)[None], None


class _Model(nn.Module, HasInnerState, SupportsMambaPrefixCaching):
    """What vLLM builds, loads and runs."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = make_config(from_hf_config(vllm_config.model_config.hf_config.to_dict()))
        group = get_tp_group()
        self.tensor = (group.rank_in_group, group.world_size)
        device = torch.get_default_device()
        with torch.device("meta"):
            model = LanguageModel(config)
            for index, block in enumerate(model.blocks):
                if config.is_softmax(index):
                    block.token_mixer = PagedAttention(config)
                else:
                    block.token_mixer = CachedAttention(config, index, vllm_config, group.world_size, prefix)
            self.full_shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
            if group.world_size > 1:
                shard_heads(model, *self.tensor, group.device_group.group_name)
        self.model = model.to(vllm_config.model_config.dtype).to_empty(device=device).requires_grad_(False)
        for index, block in enumerate(self.model.blocks):
            if isinstance(block.token_mixer, PagedAttention):
                block.token_mixer.attach(vllm_config, group.world_size, f"{prefix}layers.{index}.softmax")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [T] → embeddings [T, M]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids [T] of all texts of a step and their positions [T] → hidden [T, M]."""
        if inputs_embeds is not None:
            raise ValueError("TransNormerLLM in vLLM takes token ids, not embeddings")
        positions = positions[None]
        x = self.model._embed(input_ids[None], positions)
        for block in self.model.blocks:
            x, _ = block(x, positions, None, None)
        return self.model.final_norm(x)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, M] → [T, V] fp32, of all ranks' rows of the vocabulary."""
        logits = self.model.logits(hidden_states)
        return logits if self.tensor[1] == 1 else tensor_model_parallel_all_gather(logits)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy this rank's part of each tensor; returns the parameters' names. Raises ValueError for an unknown one."""
        parameters, loaded = dict(self.model.named_parameters()), set()
        for name, full in weights:
            own = from_official(name)
            if own in IGNORED or (name == HEAD and name not in parameters):
                continue
            if full.shape != self.full_shapes.get(own):
                raise ValueError(f"{name} {list(full.shape)} is not a tensor of this model; run tnllm convert again")
            for here, there in Layout.of(own, self.full_shapes[own], self.tensor).slices():
                parameters[own].data[here].copy_(full[there])
            loaded.add(f"model.{own}")
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a page holds on one rank."""
        config, size = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        return ((config.num_heads // size, config.head_dim, config.head_dim),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a page is copied for prefix caching: as it is."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()


class TnllmForCausalLM(_Model, IsAttentionFree):
    """Layers with states only."""


class TnllmHybridForCausalLM(_Model, IsHybrid):
    """Softmax layers among them."""
