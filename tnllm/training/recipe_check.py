"""Whether a recipe would start: checks its model, adapter, tokenizer, chat template and data without training.

report = check_recipe("385m", ["data.path=corpus"])    # UserError with one line for what is wrong
report.parameters                                       # counted on the meta device; nothing is allocated
"""

from dataclasses import dataclass

from tnllm import assets
from tnllm.chat_template import split_template
from tnllm.data.corpus import find_files
from tnllm.data.instruct import find_instruction_files
from tnllm.data.remote import is_remote, local_path
from tnllm.data.shards import is_shard_folder, read_manifest
from tnllm.errors import UserError
from tnllm.modeling.flops import count_parameters
from tnllm.modeling.lora import add_lora
from tnllm.modeling.model import build_model
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import load_recipe
from tnllm.training.loaders import open_tokenizer, planned
from tnllm.training.sections import DataSection
from tnllm.training.trackers import check_trackers


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
