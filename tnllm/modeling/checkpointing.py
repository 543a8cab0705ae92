"""Selective activation checkpointing: a block keeps the results of its matrix products and computes the rest again.

    y = selectively(block.mix, num_products, x, positions, cu_seqlens)

Norms, activations, gates, LRPE, the product of the GLU's halves and linear attention cost next to no FLOPs beside matrix
products, and their results are half of what a backward pass reads. Kept besides: softmax attention, whose work grows with
the length, and sums over tensor-parallel ranks, which are as large as the residual. The states that ranks of one row
exchange are small and sent again. The block's last product is not kept: nothing in the block's backward pass reads it.

Works inside torch.compile, whose partitioner follows the same policy, and under FSDP, whose hooks stay outside.
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# It warns on every use under torch.compile that a region must not write in place; none here does.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

MODES = ("none", "selective", "full")
_PRODUCTS = {"aten::mm", "aten::addmm"}
_KEPT = {"tnllm::all_reduce"}
_SOFTMAX_ATTENTION = ("scaled_dot_product", "varlen_attn")


def selectively(function: Callable[..., Tensor], num_products: int, *args: Any) -> Tensor:
    """`function(*args)`, which makes `num_products` matrix products; its activations are kept as said above."""
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a block is random
        context_fn=partial(_contexts, num_products),
    )


def _contexts(num_products: int) -> Any:
    seen: Counter[bool] = Counter()

    def policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op._schema.name
        if name in _PRODUCTS:
            # The first pass and the second are counted apart: torch asks in one of them or in both.
            seen[context.is_recompute] += 1
        last = seen[context.is_recompute] == num_products
        keep = name in _PRODUCTS or name in _KEPT or any(part in name for part in _SOFTMAX_ATTENTION)
        return CheckpointPolicy.MUST_SAVE if keep and not last else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
