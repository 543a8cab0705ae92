"""What a run would do, as text, without doing it.

print(dry_run_text(config))     # tnllm train RECIPE --dry-run
"""

from tnllm.device import GPUS, pick_device
from tnllm.errors import UserError
from tnllm.files import format_bytes, format_count, format_duration
from tnllm.modeling.flops import flops_per_token, lora_parameters
from tnllm.modeling.model import build_model
from tnllm.parallel.mesh import close_mesh
from tnllm.parallel.parallelize import parallelize
from tnllm.training.config import RunConfig
from tnllm.training.estimate import RESERVE, Memory, communication, estimate_memory
from tnllm.training.launch import config_mesh
from tnllm.training.loaders import corpus_tokens, open_tokenizer, planned
from tnllm.training.memory import fit_memory, free_bytes
from tnllm.training.metrics import cpu_rate
from tnllm.training.run_model import make_meta_model, weights_dtype

# Above this, a run over a small corpus is rarely what was meant.
_MANY_PASSES = 100


def dry_run_text(config: RunConfig) -> str:
    """A few lines of text: model (built on the meta device), batch, length, memory, data. Checks the tokenizer."""
    tokenizer = open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)
    corpus = corpus_tokens(config.data)
    ends = config.train.describe_ends(corpus / config.train.global_batch_tokens if corpus else None)
    about, config = "about " if config.train.max_epochs else "", planned(config)
    parameters = sum(parameter.numel() for parameter in build_model(config.model, "meta").parameters())
    tokens = config.total_steps * config.train.global_batch_tokens
    work = flops_per_token(config.model, config.data.seq_len) * tokens
    rows, length = config.train.micro_batch_size, config.data.seq_len
    shape = [1, rows * length] if config.data.packing == "reset" else [rows, length]
    sources = ", ".join(source.path for source in config.data.path) if config.data.path else "the packaged sample"
    if config.data.format == "chat":
        sources += ", the answers of its conversations"
    adapter = (
        f", with an adapter of {format_count(lora_parameters(config.model, config.lora))}" if config.lora.rank else ""
    )
    memory = _memory(config)
    persistent = memory.weights + memory.gradients + memory.optimizer
    lines = {
        "model": f"{config.model.kind}, {format_count(parameters)} parameters ({parameters:,}){adapter}",
        "data": f"{sources}; tokenizer {tokenizer.path} ({tokenizer.vocab_size} pieces)",
        "step": f"{format_count(config.train.global_batch_tokens)} tokens = {config.accumulation_steps} micro-batches "
        f"of {shape}",
        "run": f"{about}{config.total_steps} steps, {format_count(tokens)} tokens, {work:.3g} FLOPs",
        "memory": f"{format_bytes(persistent)} for weights, gradients and optimizer, plus activations",
    }
    lines |= _lines_of_ranks(config) if config.parallel.num_ranks > 1 else {}
    cards = [name for name, card in GPUS.items() if memory.total <= (1 - RESERVE) * card.memory_gib * 2**30]
    lines["fits"] = (
        f"{', '.join(cards) or 'no known card'}: {format_bytes(memory.total)} with activations ({RESERVE:.0%} left "
        "free); computed, not measured"
    )
    if config.parallel.num_ranks == 1:
        lines["here"] = _this_machine(config, work)
    lines |= {"ends": ends} if ends else {}
    lines["passes"] = _passes(tokens / corpus, corpus) if corpus else "unknown: the data is remote"
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def _memory(config: RunConfig, low_precision: bool | None = None) -> Memory:
    sections = config.model, config.lora, config.train, config.parallel, config.data.seq_len
    return estimate_memory(*sections, low_precision=low_precision)


def _passes(passes: float, corpus: float) -> str:
    text = f"about {passes:,.{0 if passes > 10 else 2}f} over about {format_count(corpus)} tokens"
    if passes > _MANY_PASSES:
        text += "; the model would learn them by heart: name a larger corpus with data.path, or train for less"
    return text


def _this_machine(config: RunConfig, work: float) -> str:
    """What one process of this machine would take: memory, and on a CPU the least time for `work` FLOPs."""
    try:
        device = pick_device(config.train.device, "train.device")
        changes: list[str] = []
        sections = config.model, config.lora, config.train, config.parallel, config.data.seq_len
        fitted = fit_memory(*sections, device, changes.append)
    except UserError as error:
        return f"would not start: {error}"
    needed = _memory(config.model_copy(update={"train": fitted}), low_precision=device.type == "cuda").total
    text = f"{device}: {format_bytes(needed)} of {format_bytes(free_bytes(device))} free"
    text += "".join(f"; {change}" for change in changes)
    if device.type == "cpu":
        text += f"; at least {format_duration(work / cpu_rate(1024))} at the rate of its matrix products"
    return text


def _lines_of_ranks(config: RunConfig) -> dict[str, str]:
    """The lines of a mesh. The model is sharded as on rank 0 of that many simulated ranks, on the meta device."""
    axes, world = config.parallel, config.parallel.num_ranks
    mesh = config_mesh(config.parallel, "cpu", fake=world)
    try:
        sharded = parallelize(
            make_meta_model(config.model, config.lora, weights_dtype(config.train, config.lora, low=False)),
            mesh,
            config.train.activation_checkpointing,
        )
        sharded.locate_shards()
        persistent = sum(part.numel() for part in sharded.parameters())
    finally:
        close_mesh(mesh)
    memory = _memory(config)
    sections = config.model, config.lora, config.data, config.train, config.parallel
    sent = communication(*sections, config.accumulation_steps)
    by_axis = ", ".join(f"{axis} {format_bytes(amount)}" for axis, amount in sent.items() if amount)
    return {
        "mesh": f"replicate {axes.replicate} * shard {axes.shard} * sequence {axes.sequence} * tensor {axes.tensor} "
        f"= {world} ranks",
        "rank": f"{format_count(persistent)} parameters ({persistent:,}); {format_bytes(memory.total)}: weights "
        f"{format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, optimizer "
        f"{format_bytes(memory.optimizer)}, unsharded {format_bytes(memory.casts)}, activations "
        f"{format_bytes(memory.activations)}, head {format_bytes(memory.head)}",
        "sends": f"{format_bytes(sum(sent.values()))} a step and rank ({by_axis or 'nothing'}); computed",
    }
