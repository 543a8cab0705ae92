"""One function that spreads a model over a mesh, in fixed order; the model's own file knows nothing of it.

    model = build_model(config, device="meta")
    sharded = parallelize(model, mesh, checkpointing="full", compiled=True, low_precision=True)
    sharded.materialize(device, seed=0)                 # the weights one process would have, this rank's part
    model.loss(tokens, labels).backward()
    norm = sharded.reduce()                             # gradients of sharded.parameters(), and their norm

Order: tensor parallelism, sequence parallelism, activation checkpointing, compilation, FSDP2. Each sees what the one
before left, so FSDP shards what tensor parallelism kept, and a compiled block holds no collective of FSDP.

The optimizer sees `sharded.parameters()`: plain tensors that share memory with what FSDP keeps. So AdamW, clipping and
checkpoints work on ordinary tensors, and `Layout` says where each lies in the whole. Of a model with an adapter
(`tnllm.modeling.lora`) the frozen weights are spread too; they have no gradients, and only the adapter's are sent.
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

from tnllm.errors import UserError
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.lora import add_lora, lora_layers
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.parallel.layout import Layout
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.sequence import sequence_attention, sequence_gated_attention
from tnllm.parallel.tensor import shard_heads


@dataclass
class Part:
    """What this rank keeps of one parameter. `source` is the module's own; `local` shares its memory."""

    layout: Layout
    source: nn.Parameter
    local: nn.Parameter
    counted: bool  # in the gradient's norm: exactly one rank of a copy counts each element


@dataclass
class ShardedModel:
    """A model on a mesh and this rank's part of each parameter, by name in the model's order."""

    model: LanguageModel
    mesh: Mesh
    parts: dict[str, Part] = field(default_factory=dict)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and local tensors, for an optimizer."""
        for name, part in self.parts.items():
            yield name, part.local

    def parameters(self) -> Iterator[nn.Parameter]:
        """Local tensors, for an optimizer."""
        for part in self.parts.values():
            yield part.local

    def materialize(self, device: torch.device, seed: int | None) -> None:
        """Allocate this rank's part on `device` and fill it: with a seed, as one process would fill the whole.

        Every rank draws the whole model's numbers, one module at a time, and keeps its part. An adapter is drawn after
        the weights it hangs on, from the same seed anew.
        """
        self.model.to_empty(device=device)
        self.find_parts()
        generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
        whole = self._whole()
        for path, module in whole.named_modules():
            if dict(module.named_parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                whole.init_module(module, generator)
                self._keep_own(path, module)
        if self.model.lora is None:
            return
        generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
        add_lora(whole, self.model.lora)
        for path, layer in lora_layers(whole).items():
            pair = {f"{path}.lora_A": layer.lora_A, f"{path}.lora_B": layer.lora_B}
            for module in pair.values():
                module.to_empty(device=device)
            layer.reset(generator)
            for name, module in pair.items():
                self._keep_own(name, module)

    def _whole(self) -> LanguageModel:
        """The model as one process would have it, on the meta device and without its adapter."""
        return build_model(self.model.config, "meta", self.model.embed_tokens.weight.dtype)

    def _keep_own(self, path: str, module: nn.Module) -> None:
        """Copy this rank's part of the parameters of `module`, which is whole and then emptied again."""
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                part = self.parts[f"{path}.{name}"]
                for mine, slices in part.layout.pieces():
                    part.local[mine].copy_(parameter[slices])
        module.to_empty(device=torch.device("meta"), recurse=False)

    def find_parts(self) -> None:
        """Fill `parts`; on the meta device too, where it says what a rank would hold."""
        model = self._whole()
        if self.model.lora is not None:
            add_lora(model, self.model.lora)
        whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.parts = {}
        for name, source in self.model.named_parameters():
            layout = Layout.of(name, whole[name], self.mesh.tensor)
            spread = isinstance(source, DTensor)
            local = source
            if isinstance(source, DTensor):
                layout = layout.with_rows(self.mesh.weights)
                local = nn.Parameter(source.to_local().detach(), requires_grad=source.requires_grad)
            assert tuple(local.shape) == layout.local_shape, (name, local.shape, layout)
            counted = (layout.dim is not None or self.mesh.tensor[0] == 0) and (spread or self.mesh.weights[0] == 0)
            self.parts[name] = Part(layout, source, local, counted)

    def reduce(self) -> Tensor:
        """Once after the last backward pass of a step: give `parameters()` the gradients summed over all ranks.

        Returns the norm of the whole gradient, fp32, the same on every rank.
        """
        self._collect()
        gradients = [p.local.grad for p in self.parts.values() if p.counted and p.local.grad is not None]
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        if gradients:
            total += torch.stack(torch._foreach_norm(gradients)).float().square().sum()
        dist.all_reduce(total, group=self.mesh.groups["replica"])
        return total.sqrt()

    def _collect(self) -> None:
        groups = self.mesh.groups
        for part in self.parts.values():
            if not part.source.requires_grad:
                continue
            gradient = part.source.grad
            assert gradient is not None, part.layout.name
            if isinstance(gradient, DTensor):
                part.local.grad, part.source.grad = gradient.to_local(), None
            elif groups["batch"].size() > 1:
                # LRPE's frequencies, which FSDP leaves alone.
                dist.all_reduce(gradient, group=groups["batch"])
            if part.layout.partial_gradient:
                assert part.local.grad is not None
                dist.all_reduce(part.local.grad, group=groups["tensor"])


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    checkpointing: str = "none",
    compiled: bool = False,
    low_precision: bool = False,
) -> ShardedModel:
    """Spread `model`, on the meta device, over `mesh`. Raises UserError for a model that an axis cannot split.

    `low_precision`: blocks are gathered in bf16, while weights, gradients' sums, embedding and head stay fp32. An adapter
    is put on before (`add_lora` on the meta device), and does not go with tensor parallelism.
    """
    assert all(parameter.is_meta for parameter in model.parameters()), "build the model on the meta device"
    if mesh.sizes["tensor"] > 1:
        assert model.lora is None, "RunConfig refuses it"
        shard_heads(model, *mesh.tensor, mesh.groups["tensor"].group_name)
    if mesh.sizes["sequence"] > 1:
        share_rows(model, mesh)
    model.set_activation_checkpointing(checkpointing)
    if compiled:
        for block in model.blocks:
            # The forward alone: FSDP's hooks on the block then stay outside of the graph.
            block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]
    if mesh.fsdp is not None:
        _shard_weights(model, mesh, low_precision)
    return ShardedModel(model, mesh)


def share_rows(model: LanguageModel, mesh: Mesh) -> None:
    """Let every attention of `model` reach across the slices of a row."""
    if model.config.kind != "transnormer":
        raise UserError(
            f"parallel.sequence is {mesh.sizes['sequence']}, but softmax attention has no state to pass on; "
            "set parallel.sequence=1 for model.kind transformer"
        )
    here: dict[str, Any] = {
        "rank": mesh.place["sequence"],
        "size": mesh.sizes["sequence"],
        "group": mesh.groups["sequence"].group_name,
    }
    for block in model.blocks:
        mixer = block.token_mixer
        assert isinstance(mixer, GatedLinearAttention)
        mixer.attend = partial(sequence_attention, **here)
        mixer.gated_attention = partial(sequence_gated_attention, **here)


def _shard_weights(model: LanguageModel, mesh: Mesh, low_precision: bool) -> None:
    assert mesh.fsdp is not None
    # theta must not be rounded to bf16 on its way, and is small: every rank keeps it, fp32.
    alone = {parameter for name, parameter in model.named_parameters() if name.endswith("lrpe.theta")}
    low = MixedPrecisionPolicy(torch.bfloat16 if low_precision else None, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=low, reshard_after_forward=True, ignored_params=alone)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=exact, ignored_params=alone)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the labels of all ranks, so gradients are added, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
