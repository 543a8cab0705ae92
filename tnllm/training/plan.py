"""What a run would do, without doing it: `tnllm train RECIPE --dry-run`."""

from tnllm.files import format_bytes, format_count
from tnllm.modeling.flops import flops_per_token
from tnllm.modeling.model import build_model
from tnllm.training.config import RunConfig
from tnllm.training.corpus import open_tokenizer


def plan(config: RunConfig) -> str:
    """A few lines of text: model (built on the meta device), batch, length, memory, data. Checks the tokenizer."""
    tokenizer = open_tokenizer(config)
    parameters = sum(parameter.numel() for parameter in build_model(config.model, "meta").parameters())
    tokens = config.total_steps * config.train.global_batch_tokens
    work = flops_per_token(config.model, config.data.seq_len) * tokens
    rows, length = config.train.micro_batch_size, config.data.seq_len
    shape = [1, rows * length] if config.data.packing == "reset" else [rows, length]
    sources = ", ".join(source.path for source in config.data.path) if config.data.path else "the packaged sample"
    lines = {
        "model": f"{config.model.kind}, {format_count(parameters)} parameters ({parameters:,})",
        "data": f"{sources}; tokenizer {tokenizer.path} ({tokenizer.vocab_size} pieces)",
        "step": f"{format_count(config.train.global_batch_tokens)} tokens = {config.accumulation_steps} micro-batches "
        f"of {shape}",
        "run": f"{config.total_steps} steps, {format_count(tokens)} tokens, {work:.3g} FLOPs",
        # fp32 weights, gradients and two moments.
        "memory": f"{format_bytes(16 * parameters)} for weights, gradients and optimizer, plus activations",
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())
