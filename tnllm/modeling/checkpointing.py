"""Selective activation checkpointing: a block saves the results of its matrix products and recomputes the rest.

    y = checkpoint_selectively(function, num_products, x, positions, cu_seqlens)

Norms, activations, gates, LRPE, the product of the GLU's halves and linear attention cost few FLOPs beside matrix
products, and their results are half of what a backward pass reads. Saved as well: softmax attention, whose work grows
with the length, and all-reduces over tensor-parallel ranks, which are as large as the residual. The states that
sequence-parallel ranks exchange are small and sent again. The block's last product is not saved: its backward pass does
not read it.

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

# It warns on every use under torch.compile that the function must not write in place; none here does.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

MODES = ("none", "selective", "full")
_PRODUCTS = {"aten::mm", "aten::addmm"}
_SAVED = {"tnllm::all_reduce"}
_SOFTMAX_ATTENTION = ("scaled_dot_product", "varlen_attn")


def checkpoint_selectively(function: Callable[..., Tensor], num_products: int, *args: Any) -> Tensor:
    """`function(*args)` with activations saved as described above; it computes `num_products` matrix products."""
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
            # Forward and recomputation are counted separately: torch may call the policy in either or both.
            seen[context.is_recompute] += 1
        last = seen[context.is_recompute] == num_products
        keep = name in _PRODUCTS or name in _SAVED or any(op_name in name for op_name in _SOFTMAX_ATTENTION)
        return CheckpointPolicy.MUST_SAVE if keep and not last else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
