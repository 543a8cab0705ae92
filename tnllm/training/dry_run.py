"""What a run would do, as text, and whether it would start, without doing it.

print(dry_run_text(config))                             # tnllm train RECIPE --dry-run
report = check_recipe("385m", ["data.path=corpus"])     # UserError with one line for what is wrong
"""

from dataclasses import dataclass

from tnllm import assets
from tnllm.chat_template import split_template
from tnllm.data.corpus import find_files
from tnllm.data.instruct import find_instruction_files
from tnllm.data.remote import is_remote, local_path
from tnllm.data.shards import is_shard_folder, read_manifest
from tnllm.device import GPUS, pick_device
from tnllm.errors import UserError
from tnllm.files import format_bytes, format_count, format_duration
from tnllm.modeling.flops import count_parameters, flops_per_token, lora_parameters
from tnllm.modeling.lora import add_lora
from tnllm.modeling.model import build_model
from tnllm.parallel.mesh import close_mesh
from tnllm.parallel.parallelize import parallelize
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import RunConfig, load_recipe
from tnllm.training.estimate import RESERVE, Memory, communication, estimate_memory
from tnllm.training.launch import config_mesh
from tnllm.training.loaders import corpus_tokens, open_tokenizer, planned
from tnllm.training.memory import fit_memory, free_bytes
from tnllm.training.metrics import cpu_rate
from tnllm.training.run_model import make_meta_model, weights_dtype
from tnllm.training.sections import DataSection
from tnllm.training.trackers import check_trackers

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


@dataclass(frozen=True)
class Report:
    """What a recipe that passes would train."""

    recipe: str
    parameters: int
    tokens: int
    steps: int
    ranks: int
    tokenizer: str
    data: list[str]


def check_recipe(name: str, sets: list[str] | tuple[str, ...] = ()) -> Report:
    """Load the recipe, build its model and adapter on the meta device, open its tokenizer, and look at its data.

    Raises UserError for the first thing that would stop a run.
    """
    config = load_recipe(name, sets)
    check_trackers(config.log)
    model = build_model(config.model, device="meta")
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == count_parameters(config.model), (built, count_parameters(config.model))
    if config.lora.rank:
        add_lora(model, config.lora)
    if config.data.format == "chat":
        split_template(config.prompt_template)
    tokenizer = open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)
    data = _check_data(config.data, tokenizer)
    config = planned(config)
    return Report(
        recipe=name,
        parameters=built,
        tokens=config.total_steps * config.train.global_batch_tokens,
        steps=config.total_steps,
        ranks=config.parallel.num_ranks,
        tokenizer=str(tokenizer.path),
        data=data,
    )


def _check_data(data: DataSection, tokenizer: Tokenizer) -> list[str]:
    """The recipe's data, each of which has files that training would read; a remote one is not looked at."""
    default = assets.sample_corpus() if data.format == "text" else assets.sample_instructions()
    paths = [str(default)] if data.path is None else [source.path for source in data.path]
    for key, path in [("path", path) for path in paths] + [("val_path", path) for path in data.val_path or ()]:
        if is_remote(path):
            continue
        place = assets.named(local_path(path))
        if not place.exists():
            raise UserError(f"data.{key} is {path}: no such file or folder ({assets.SHIPPED})")
        if place.is_dir() and not any(place.iterdir()):
            raise UserError(f"data.{key} is {path}: the folder is empty")
        if data.format == "chat":
            find_instruction_files(place)
        elif not is_shard_folder(place):
            find_files([path])
        elif read_manifest(place).tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"data.{key} is {path}: made with another tokenizer than {tokenizer.path}")
    return paths
