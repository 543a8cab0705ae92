"""Parallelize a model over a mesh in one fixed order; the model's own code knows nothing of it.

    model = build_model(config, device="meta")
    sharded = parallelize(model, mesh, checkpointing="full", compiled=True, low_precision=True)
    sharded.materialize(device, seed=0)                 # this rank's shards of the weights of a single process
    model.loss(tokens, labels).backward()
    norm = sharded.reduce_gradients()                   # gradients of sharded.parameters(), and their norm

Order: tensor parallelism, sequence parallelism, activation checkpointing, compilation, FSDP2. Each step sees the result
of the previous one: FSDP shards the tensor-parallel shards, and a compiled block contains no collective of FSDP.

The optimizer gets `sharded.parameters()`: plain tensors that share memory with FSDP's. So AdamW, clipping and checkpoints
need no DTensor, and `Layout` says where each shard lies in the full parameter. With an adapter (`tnllm.modeling.lora`)
the frozen weights are sharded too; only the adapter has gradients to communicate.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.lora import add_lora, lora_layers
from tnllm.modeling.model import LanguageModel, build_model, compile_block
from tnllm.parallel.layout import PARTIAL_GRADIENT, Layout
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.sequence import sequence_attention, sequence_gated_attention
from tnllm.parallel.tensor import shard_heads


@dataclass
class Shard:
    """This rank's shard of one parameter. `source` is the module's parameter; `local` shares its memory."""

    layout: Layout
    source: nn.Parameter
    local: nn.Parameter
    in_norm: bool  # counted in the gradient norm: true on exactly one rank of a copy for each element


@dataclass
class ShardedModel:
    """A model on a mesh and this rank's shard of each parameter, by name in the model's order."""

    model: LanguageModel
    mesh: Mesh
    shards: dict[str, Shard] = field(default_factory=dict)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and local tensors, for an optimizer."""
        return ((name, shard.local) for name, shard in self.shards.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Local tensors, for an optimizer."""
        return (shard.local for shard in self.shards.values())

    def materialize(self, device: torch.device, seed: int | None) -> None:
        """Allocate this rank's shards on `device` and initialise them; with a seed as in a single process.

        Every rank generates the full weights, one module at a time, and keeps its shards. The generator is seeded again
        for an adapter, which is initialised last.
        """
        self.model.to_empty(device=device)
        self.locate_shards()
        generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
        full = self._full_model()
        for path, module in full.named_modules():
            if dict(module.named_parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                full.init_module(module, generator)
                self._keep_shards(path, module)
        if self.model.lora is None:
            return
        generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
        add_lora(full, self.model.lora)
        for path, layer in lora_layers(full).items():
            pair = {f"{path}.lora_A": layer.lora_A, f"{path}.lora_B": layer.lora_B}
            for module in pair.values():
                module.to_empty(device=device)
            layer.reset(generator)
            for name, module in pair.items():
                self._keep_shards(name, module)

    def _full_model(self) -> LanguageModel:
        """The unsharded model on the meta device, without its adapter."""
        return build_model(self.model.config, "meta", self.model.embed_tokens.weight.dtype)

    def _keep_shards(self, path: str, module: nn.Module) -> None:
        """Copy this rank's shards from the unsharded `module`, then free it."""
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                shard = self.shards[f"{path}.{name}"]
                for local, full in shard.layout.slices():
                    shard.local[local].copy_(parameter[full])
        module.to_empty(device=torch.device("meta"), recurse=False)

    def locate_shards(self) -> None:
        """Fill `shards`; on the meta device too, where they have shapes but no memory."""
        model = self._full_model()
        if self.model.lora is not None:
            add_lora(model, self.model.lora)
        full_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.shards = {}
        for name, source in self.model.named_parameters():
            layout = Layout.of(name, full_shapes[name], self.mesh.tensor)
            by_fsdp = isinstance(source, DTensor)
            local = source
            if isinstance(source, DTensor):
                layout = layout.with_rows(self.mesh.weights)
                local = nn.Parameter(source.to_local().detach(), requires_grad=source.requires_grad)
            assert tuple(local.shape) == layout.local_shape, (name, local.shape, layout)
            in_norm = (layout.dim is not None or self.mesh.tensor[0] == 0) and (by_fsdp or self.mesh.weights[0] == 0)
            self.shards[name] = Shard(layout, source, local, in_norm)

    def reduce_gradients(self) -> Tensor:
        """Give `parameters()` the gradients summed over ranks; once, after the last backward pass of a step.

        Returns the norm of the full gradient, fp32, the same on every rank.
        """
        groups = self.mesh.groups
        for shard in self.shards.values():
            if not shard.source.requires_grad:
                continue
            gradient = shard.source.grad
            assert gradient is not None, shard.layout.name
            if isinstance(gradient, DTensor):
                shard.local.grad, shard.source.grad = gradient.to_local(), None
            elif groups["batch"].size() > 1:
                # LRPE's frequencies, which FSDP ignores.
                dist.all_reduce(gradient, group=groups["batch"])
            if self.mesh.sizes["tensor"] > 1 and shard.layout.name.endswith(PARTIAL_GRADIENT):
                assert shard.local.grad is not None
                dist.all_reduce(shard.local.grad, group=groups["tensor"])
        gradients = [p.local.grad for p in self.shards.values() if p.in_norm and p.local.grad is not None]
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        if gradients:
            total += torch.stack(torch._foreach_norm(gradients)).float().square().sum()
        dist.all_reduce(total, group=groups["replica"])
        return total.sqrt()


def parallelize(
    model: LanguageModel, mesh: Mesh, checkpointing: str = "none", compiled: bool = False, low_precision: bool = False
) -> ShardedModel:
    """Parallelize `model`, on the meta device, over `mesh`, whose axes can split it: RunConfig says so.

    `low_precision`: blocks are gathered in bf16; weights, gradient reduction, embedding and head stay fp32. Add an
    adapter before (`add_lora` on the meta device); tensor parallelism does not support one.
    """
    assert all(parameter.is_meta for parameter in model.parameters()), "build the model on the meta device"
    if mesh.sizes["tensor"] > 1:
        assert model.lora is None, "RunConfig refuses it"
        shard_heads(model, *mesh.tensor, mesh.groups["tensor"].group_name)
    if mesh.sizes["sequence"] > 1:
        # Every attention works on one slice of a row, with the state passed between ranks.
        assert not model.config.num_softmax, "RunConfig refuses it"
        group = mesh.groups["sequence"].group_name
        slices: dict[str, Any] = {"rank": mesh.index["sequence"], "size": mesh.sizes["sequence"], "group": group}
        for block in model.blocks:
            assert isinstance(block.token_mixer, GatedLinearAttention)
            block.token_mixer.attend = partial(sequence_attention, **slices)
            block.token_mixer.gated_attention = partial(sequence_gated_attention, **slices)
    model.set_activation_checkpointing(checkpointing)
    if compiled:
        for block in model.blocks:
            # Only the forward, so that FSDP's hooks on the block stay out of the graph.
            block.forward = compile_block(block.forward)  # type: ignore[method-assign]
    if mesh.fsdp is not None:
        _shard_weights(model, mesh, low_precision)
    return ShardedModel(model, mesh)


def _shard_weights(model: LanguageModel, mesh: Mesh, low_precision: bool) -> None:
    assert mesh.fsdp is not None
    # LRPE's theta is small and must not be rounded to bf16 when gathered: it is replicated, in fp32.
    replicated = {parameter for name, parameter in model.named_parameters() if name.endswith("lrpe.theta")}
    low = MixedPrecisionPolicy(torch.bfloat16 if low_precision else None, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=low, reshard_after_forward=True, ignored_params=replicated)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=exact, ignored_params=replicated)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the labels of all ranks, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
