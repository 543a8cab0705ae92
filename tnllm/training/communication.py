"""Bytes that a rank sends in an optimizer step, computed.

    communication(model, lora, data, train, parallel, passes=1)     # {"weights": ..., "replicate": ..., ...}

With n ranks, a ring sends (n - 1) / n of a tensor from each rank for an all-gather or a reduce-scatter, and twice that for
an all-reduce. For one pass over N tokens of a rank, with P parameters of the blocks and V M of embedding and head on a
tensor rank:

    weights    all-gather of the blocks twice (forward, backward) in the compute type, of embedding and head once in fp32;
               reduce-scatter of all gradients in fp32. Independent of N. With an adapter, embedding and head are kept in
               the compute type, and only the adapter has gradients.
    replicate  all-reduce of each rank's shard of the gradients in fp32.
    tensor     four all-reduces of N M numbers a block (two forward, two backward; full recomputation repeats the mixer's,
               not the last one), one number a token for the norm over heads each way; in fp32 N M numbers for the
               embedding and for the head.
    sequence   one state [H, D, E] fp32 a row and layer to each other rank, forward and backward (and once more with
               recomputation of either kind). Independent of N.

Selective recomputation repeats no all-reduce of `tensor`: their results are saved.
"""

from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.modeling.flops import count_parameters, lora_parameters, root_parameters
from tnllm.training.sections import DataSection, ParallelSection, TrainSection


def communication(
    model: ModelConfig,
    lora: LoraConfig,
    data: DataSection,
    train: TrainSection,
    parallel: ParallelSection,
    passes: int,
    low_precision: bool | None = None,
) -> dict[str, float]:
    """Bytes that one rank sends in a step of `passes`, by axis of the mesh ("weights" is shard and sequence together)."""
    if low_precision is None:
        low_precision = train.dtype != "fp32" and train.device != "cpu"
    item = 2 if low_precision else 4
    repeats = 1 if train.activation_checkpointing == "full" else 0
    exchanges = 2 if train.activation_checkpointing == "none" else 3
    root = root_parameters(model) / parallel.tensor
    blocks = count_parameters(model) / parallel.tensor - root
    trained, kept = blocks + root, 4
    if lora.rank:
        trained, kept = lora_parameters(model, lora), item
        blocks += trained
    holders = parallel.shard * parallel.sequence
    gather = (holders - 1) / holders
    weights = gather * (2 * item * blocks + kept * root + 4 * trained)
    copies = parallel.replicate
    replicate = 2 * (copies - 1) / copies * 4 * trained / holders
    tokens = train.micro_batch_size * data.seq_len // parallel.sequence
    ring = 2 * (parallel.tensor - 1) / parallel.tensor
    per_block: float = (4 + repeats) * item * model.model_dim
    # The norm over heads; no softmax layer has one.
    linear = 1 - model.num_softmax / model.num_layers
    per_block += linear * (2 + repeats) * 4 * (2 if model.norm == "layernorm" else 1)
    ends = 2 * 4 * model.model_dim + 3 * 4
    rows = train.micro_batch_size if data.packing == "concat" else 1
    states = sum(4 * model.model_dim * model.key_dim(layer) for layer in range(model.num_layers)) / parallel.tensor
    return {
        "weights": passes * weights,
        "replicate": passes * replicate,
        "sequence": passes * (parallel.sequence - 1) * exchanges * rows * states,
        "tensor": passes * ring * tokens * (model.num_layers * per_block + ends),
    }
