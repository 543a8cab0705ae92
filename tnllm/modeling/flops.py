"""How large a model is and how much work a token costs, by formula; nothing is allocated.

    count_parameters(config)               # 398_984_192 for the 385m preset
    flops_per_token(config, seq_len=8192)  # training FLOPs (forward + backward) of one token

A multiply-add counts as two FLOPs. Only work that the model defines is counted, not recomputation, the masked half of a
chunk or the optimizer, so that MFU from these numbers is comparable between implementations.
"""

from tnllm.modeling.config import LoraConfig, ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Number of trained parameters, tied weights counted once (equals the built model's)."""
    total = config.vocab_size * config.model_dim * (1 if config.tie_embeddings else 2)
    if config.position == "ape":
        total += config.max_position * config.model_dim
    norm = 0 if config.norm == "srmsnorm" else config.model_dim
    for layer in range(config.num_layers):
        total += _matrix_parameters(config, layer) + 2 * norm
        if not config.is_softmax(layer):
            total += norm + (config.model_dim if config.uses_lrpe(layer) else 0)
        elif config.qk_norm:
            total += 2 * config.head_dim
    return total + norm


def root_parameters(config: ModelConfig) -> int:
    """Parameters outside the blocks: embedding, head, learned positions, final norm."""
    return count_parameters(config.model_copy(update={"num_layers": 0}))


def lora_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of an adapter: rank * (in + out) for each projection it is attached to."""
    width, glu = config.model_dim, config.glu_dim
    total = 0
    for layer in range(config.num_layers):
        gated = config.gate == "full" and not config.is_softmax(layer)
        fused = {"qkvu_proj": 5 * width} if gated else {"qkv_proj": 4 * width}
        sizes = {**fused, "out_proj": 2 * width, **dict.fromkeys(("l1", "l2", "l3"), width + glu)}
        total += sum(sizes.get(name, 0) for name in lora.targets or sizes)
    return lora.rank * total


def _matrix_parameters(config: ModelConfig, layer: int) -> int:
    width = config.model_dim
    mixer = 4 * width * width
    if not config.is_softmax(layer):
        if config.gate == "full":
            mixer += width * width
        elif config.gate == "low-rank":
            mixer += 2 * width * config.gate_dim
    return mixer + 3 * width * config.glu_dim


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token at this length: 6 per matrix weight, plus three times attention's forward.

    Linear attention's forward is the recurrence itself, 4 H D E per layer whatever the length (one rank-1 update
    and one read of the state); softmax attention's is 4 H d times the mean causal context (T + 1) / 2.
    """
    matrices = _all_matrices(config) + config.vocab_size * config.model_dim
    return 6.0 * matrices + 3.0 * _attention_flops(config, seq_len)


def recomputed_flops_per_token(config: ModelConfig, seq_len: int, mode: str) -> float:
    """FLOPs per token that train.activation_checkpointing recomputes: blocks (full) or linear attention (selective)."""
    if mode == "full":
        return 2.0 * _all_matrices(config) + _attention_flops(config, seq_len)
    return _attention_flops(config, 0) if mode == "selective" else 0.0


def _all_matrices(config: ModelConfig) -> int:
    return sum(_matrix_parameters(config, layer) for layer in range(config.num_layers))


def _attention_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of all layers' attention; at length 0 that of the linear layers alone."""
    attention = 0.0
    for layer in range(config.num_layers):
        if not config.is_softmax(layer):
            attention += 4 * config.num_heads * config.key_dim(layer) * config.head_dim
        elif seq_len:
            attention += 4 * config.model_dim * (seq_len + 1) / 2
    return attention


def state_bytes(config: ModelConfig, length: int = 0, cache_itemsize: int = 2) -> int:
    """Bytes of decoding state for one sequence: fp32 and constant in linear layers, `length` cached tokens in others."""
    linear = [config.key_dim(layer) for layer in range(config.num_layers) if not config.is_softmax(layer)]
    cache = 2 * config.num_softmax * length * config.model_dim * cache_itemsize
    return 4 * config.num_heads * config.head_dim * sum(linear) + cache
