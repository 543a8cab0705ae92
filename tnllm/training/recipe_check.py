"""Whether a recipe would start: checks its model, tokenizer and data without training.

report = check_recipe("385m", ["data.path=corpus"])    # UserError with one line for what is wrong
report.parameters                                       # counted on the meta device; nothing is allocated
"""

from dataclasses import asdict, dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

from tnllm import assets
from tnllm.data.remote import is_remote, local_path
from tnllm.errors import UserError
from tnllm.modeling.flops import count_parameters
from tnllm.modeling.model import build_model
from tnllm.training.config import DataSection, load_recipe
from tnllm.training.loaders import open_tokenizer


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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_recipe(name: str, sets: list[str] | tuple[str, ...] = ()) -> Report:
    """Load the recipe, build its model on the meta device, open its tokenizer and check that its data exists.

    Raises UserError for the first thing that would stop a run.
    """
    config = load_recipe(name, sets)
    model = build_model(config.model, device="meta")
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == count_parameters(config.model), (built, count_parameters(config.model))
    return Report(
        recipe=name,
        parameters=built,
        tokens=config.total_steps * config.train.global_batch_tokens,
        steps=config.total_steps,
        ranks=config.world_size,
        tokenizer=str(open_tokenizer(config).path),
        data=_check_data(config.data),
    )


def _check_data(data: DataSection) -> list[str]:
    paths = [str(assets.sample_corpus())] if data.path is None else [source.path for source in data.path]
    for path in filterfalse(is_remote, paths):
        local = Path(local_path(path))
        if not assets.named(local).exists():
            raise UserError(f"data.path is {path}: no such file or folder")
        if local.is_dir() and not any(local.iterdir()):
            raise UserError(f"data.path is {path}: the folder is empty")
    return paths
