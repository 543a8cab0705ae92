"""Computed costs of a run: memory of one rank, FLOPs, days. Nothing is allocated.

estimate(config, gpu="h100", mfu=0.4)             # everything, ready for JSON
memory = estimate_memory(model, lora, train, parallel, seq_len)     # bytes of one rank: weights, gradients, ...
sent = communication(model, lora, data, train, parallel, passes=1)  # bytes a rank sends in a step, by axis
GPUS["h100"].memory_gib

Nothing here is measured. `activation_bytes` counts the tensors that autograd saves for the backward pass; its docstring
lists them, and a test compares it with what a small model saves. The peak of a run is a little higher: workspaces,
fragmentation and communication buffers are not included (see RESERVE).
"""

from dataclasses import asdict, dataclass
from typing import Any

from tnllm.device import GPUS
from tnllm.errors import UserError, did_you_mean
from tnllm.modeling.checkpointing import MODES
from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.modeling.flops import (
    count_parameters,
    flops_per_token,
    lora_parameters,
    recomputed_flops_per_token,
    root_parameters,
    state_bytes,
)
from tnllm.training.config import RunConfig
from tnllm.training.sections import DataSection, ParallelSection, TrainSection

# Share of a card left for what is not counted: the CUDA context, workspaces and fragmentation.
RESERVE = 0.08


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a training step."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Their sum: the peak, reached in the backward pass."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.activations + self.head


def estimate_memory(
    model: ModelConfig,
    lora: LoraConfig,
    train: TrainSection,
    parallel: ParallelSection,
    seq_len: int,
    checkpointing: str | None = None,
    low_precision: bool | None = None,
) -> Memory:
    """Memory of one rank for a forward and backward pass of `micro_batch_size` rows of `seq_len` tokens.

    Weights, gradients and AdamW's two moments are fp32 (or bf16: train.weights) and sharded over parallel.shard,
    parallel.sequence and parallel.tensor. `casts` are the low-precision copies that autocast makes of the weights, which
    live through a pass. If weights are sharded, it is what is unsharded at a time instead: two blocks and their gradients,
    one block's gradients in fp32 being reduced, embedding and head with their gradients in fp32. With an adapter, the base
    is frozen and kept in the compute type; only the adapter, sharded alike, has gradients and moments. `checkpointing` and
    `low_precision` (bf16) default to the recipe's; `train.dtype: auto` counts as bf16, as on a GPU.
    """
    checkpointing = checkpointing or train.activation_checkpointing
    if low_precision is None:
        low_precision = train.dtype != "fp32" and train.device != "cpu"
    item = 2 if low_precision else 4
    parameters = count_parameters(model)
    holders = parallel.shard * parallel.sequence
    local = -(-parameters // (holders * parallel.tensor))
    casts, kept = 0, 4
    if train.weights == "bf16":
        item = kept = 2
    elif holders * parallel.replicate > 1:
        root = root_parameters(model)
        block = (parameters - root) // model.num_layers
        casts = (min(2, model.num_layers) * 2 * item * block + 4 * block + 2 * 4 * root) // parallel.tensor
    elif low_precision:
        casts = item * parameters // parallel.tensor
    trained, frozen = local, 0
    if lora.rank:
        adapter, casts = lora_parameters(model, lora), 0
        trained, frozen = -(-adapter // holders), item * local
        if holders * parallel.replicate > 1:
            root, two = root_parameters(model), min(2, model.num_layers)
            own = adapter // model.num_layers
            casts = two * item * ((parameters - root) // model.num_layers + 2 * own) + 4 * own + item * root
    tokens = train.micro_batch_size * seq_len // parallel.sequence
    return Memory(
        weights=frozen + kept * trained,
        gradients=kept * trained,
        optimizer=2 * kept * trained,
        casts=casts,
        activations=activation_bytes(model, tokens, item, checkpointing, parallel.tensor),
        head=head_bytes(model, tokens, item, parallel.tensor),
    )


def activation_bytes(
    model: ModelConfig, num_tokens: int, itemsize: int, checkpointing: str = "none", tensor: int = 1
) -> int:
    """Bytes saved for the backward pass of `num_tokens` tokens, without the head.

    A block of TransNormerLLM saves, in numbers of `itemsize` bytes for each token: the residual before each norm and
    each norm's output (4 M), the projection's output q k v u (4 M; 3 M without a full gate), activated q and k
    (2 M), attention's output, its norm and the gated product (3 M), the two halves of the GLU and their product
    (3 F); and one fp32 number for each of three norms. LRPE saves its input, which is q and k again, and makes
    them twice as wide (2 M more). The baseline saves 10 M (q, k rotated; attention's output) and 3 F, and one more
    F for SwiGLU's activation. Heads and F are divided over tensor-parallel ranks, the residual is not.

    With checkpointing `full` every block saves its input (M), with `selective` also the results of its products but the
    last (M and 2 F, the projection's, a low-rank gate's); one block at a time is recomputed in full.
    """
    M, L = model.model_dim, model.num_layers
    layers = [_block_numbers(model, layer, tensor) for layer in range(L)]
    norms = [4 * (2 if model.is_softmax(layer) else 3) for layer in range(L)]
    final = M * itemsize + 4
    if checkpointing != "none":
        kept = [M if checkpointing == "full" else _kept_products(model, layer, tensor) for layer in range(L)]
        again = max((block - own) * itemsize + norm for block, own, norm in zip(layers, kept, norms, strict=True))
        again += M * itemsize if checkpointing == "full" else 0
        return round(num_tokens * (sum(kept) * itemsize + again + final))
    return round(num_tokens * (sum(layers) * itemsize + sum(norms) + final))


def _kept_products(model: ModelConfig, layer: int, tensor: int) -> float:
    """Numbers saved for each token by one block under selective checkpointing; see `activation_bytes`."""
    M, shared = model.model_dim, 3 * model.model_dim + 2 * model.glu_dim
    if model.is_softmax(layer):
        shared += M  # attention's output: softmax attention is not recomputed
    elif model.gate != "none":
        shared += M + (model.gate_dim if model.gate == "low-rank" else 0)
    return 2 * M + shared / tensor


def _block_numbers(model: ModelConfig, layer: int, tensor: int) -> float:
    """Numbers saved for each token by one block; see `activation_bytes`."""
    M, F = model.model_dim, model.glu_dim
    glu = F * (3 if model.glu_activation == "none" else 4)
    if model.is_softmax(layer):
        return 4 * M + (6 * M + glu) / tensor
    mixer = 7 * M
    mixer += {"full": 2 * M, "low-rank": 2 * M + 2 * model.gate_dim, "none": 0}[model.gate]
    if model.activation == "none" and not model.uses_lrpe(layer):
        mixer -= 2 * M
    if model.uses_lrpe(layer):
        mixer += 2 * M
    if model.value_activation != "none":
        mixer += M
    return 4 * M + (mixer + glu) / tensor


def head_bytes(model: ModelConfig, num_tokens: int, itemsize: int, tensor: int = 1) -> int:
    """Bytes of the fused head and loss: fp32 logits of one chunk and their low-precision copy, and both gradients.

    A chunk is as many tokens as make 256 M logits, the most `linear_cross_entropy` holds on a GPU.
    """
    vocabulary = model.vocab_size // tensor
    rows = min(num_tokens, max(1, (1 << 28) // vocabulary))
    copy = 0 if itemsize == 4 else itemsize
    return rows * vocabulary * (4 + copy) + num_tokens * model.model_dim * itemsize + 4 * vocabulary * model.model_dim


def settings_at_length(train: TrainSection, before: int, data_ranks: int, seq_len: int) -> list[str]:
    """`--set` items for rows of `seq_len` tokens instead of `before`, with as many tokens per pass and per step."""
    rows = max(1, train.micro_batch_size * before // seq_len)
    unit = rows * seq_len * data_ranks
    batch = -(-train.global_batch_tokens // unit) * unit
    return [f"data.seq_len={seq_len}", f"train.micro_batch_size={rows}", f"train.global_batch_tokens={batch}"]


def estimate(
    config: RunConfig,
    gpu: str | None = None,
    memory_gib: float | None = None,
    tokens_per_s: float | None = None,
    mfu: float | None = None,
    num_gpus: int | None = None,
) -> dict[str, Any]:
    """The complete estimate as plain values.

    `rank_gib`: components and total for each mode of train.activation_checkpointing. `fits`: whether a total leaves RESERVE
    free on the named GPU, in `memory_gib`, or else on every known GPU. `tokens_per_s`: of all ranks together; without it
    the share `mfu` of the peak of `num_gpus` of `gpu`. `again`: recomputed FLOPs as a share of the model's own.
    """
    card = GPUS.get(gpu.lower()) if gpu else None
    if gpu and card is None:
        raise UserError(f"--gpu is {gpu!r}; allowed: {', '.join(GPUS)}{did_you_mean(gpu.lower(), GPUS)}")
    model, train, seq_len = config.model, config.train, config.data.seq_len
    tokens, per_token = config.total_steps * train.global_batch_tokens, flops_per_token(model, seq_len)
    if tokens_per_s is None and mfu is not None:
        assert card is not None, "mfu is a share of a GPU's peak"
        tokens_per_s = mfu * card.peak_flops * (num_gpus or config.parallel.num_ranks) / per_token
    rank: dict[str, dict[str, float]] = {}
    again: dict[str, float] = {}
    for mode in MODES:
        again[mode] = recomputed_flops_per_token(model, seq_len, mode) / per_token
        memory = estimate_memory(model, config.lora, train, config.parallel, seq_len, mode)
        rank[mode] = {**{key: value / 2**30 for key, value in asdict(memory).items()}, "total": memory.total / 2**30}
    sizes = {name: known.memory_gib for name, known in GPUS.items()}
    if card is not None:
        sizes = {str(gpu): card.memory_gib}
    if memory_gib is not None:
        sizes = {f"{memory_gib:g} GiB": memory_gib}
    return {
        "kind": model.kind,
        "softmax_layers": model.num_softmax,
        "parameters": count_parameters(model),
        "ranks": config.parallel.num_ranks,
        "rows_per_pass": train.micro_batch_size,
        "seq_len": seq_len,
        "rank_gib": rank,
        "activation_checkpointing": train.activation_checkpointing,
        "again": again,
        "reserve": RESERVE,
        "fits": {
            name: {mode: rank[mode]["total"] <= size * (1 - RESERVE) for mode in rank} for name, size in sizes.items()
        },
        "state_gib": state_bytes(model, seq_len) / 2**30,
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "tokens_per_s": tokens_per_s,
        "days": tokens / tokens_per_s / 86400 if tokens_per_s else None,
    }


def communication(
    model: ModelConfig,
    lora: LoraConfig,
    data: DataSection,
    train: TrainSection,
    parallel: ParallelSection,
    passes: int,
    low_precision: bool | None = None,
) -> dict[str, float]:
    """Bytes that one rank sends in a step of `passes`, by axis of the mesh ("weights" is shard and sequence together).

    With n ranks, a ring sends (n - 1) / n of a tensor from each rank for an all-gather or a reduce-scatter, and twice that
    for an all-reduce. For one pass over N tokens of a rank, on a tensor rank:

        weights    all-gather of the blocks twice (forward, backward) in the compute type, of embedding and head once in
                   fp32; reduce-scatter of all gradients in fp32. Independent of N. With an adapter, embedding and head
                   are kept in the compute type, and only the adapter has gradients.
        replicate  all-reduce of each rank's shard of the gradients in fp32.
        tensor     four all-reduces of N M numbers a block (two forward, two backward; full recomputation repeats the
                   mixer's, not the last one), one number a token for the norm over heads each way; in fp32 N M numbers
                   for the embedding and for the head.
        sequence   one state [H, D, E] fp32 a row and layer to each other rank, forward and backward (and once more with
                   recomputation of either kind). Independent of N.

    Selective recomputation repeats no all-reduce of `tensor`: their results are saved.
    """
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
