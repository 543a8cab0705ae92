"""The model a run starts from: new weights, those of a folder, or those with an adapter beside them.

model = make_model(config, device, low)       # train.init, train.weights, lora and recomputation applied
model = make_meta_model(config, low)             # the same shapes and dtypes on the meta device, for a mesh
publish(model, out, config, tokenizer)        # weights/, and adapter/ where there is one
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tnllm.chat_template import DEFAULT
from tnllm.errors import UserError
from tnllm.modeling.lora import add_lora, merge_lora, save_adapter
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.modeling.weights import GENERATION, load_model, resolve_model, save_model
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import PACKAGED, RunConfig

if TYPE_CHECKING:
    from tnllm.parallel.parallelize import ShardedModel


def init_folder(config: RunConfig) -> Path | None:
    """The weights folder behind train.init. Raises UserError where there is none."""
    if config.train.init is None:
        return None
    return resolve_model(None if config.train.init == PACKAGED else config.train.init)


def make_model(config: RunConfig, device: torch.device, low: bool) -> LanguageModel:
    """Trainable weights on `device`, kept in fp32 or as train.weights says.

    With an adapter the base is frozen; `low` (products run in bf16) keeps it in bf16 then, since nothing is added to it.
    """
    kept = kept_dtype(config, low)
    folder = init_folder(config)
    if folder is None:
        model = build_model(config.model, device, kept, seed=config.train.seed)
    else:
        model = load_model(folder, device, kept).train().requires_grad_(True)
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.train.seed)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    return model


def make_meta_model(config: RunConfig, low: bool) -> LanguageModel:
    """What `make_model` makes, on the meta device; `parallelize` takes it from there."""
    model = build_model(config.model, "meta", kept_dtype(config, low))
    if config.lora.rank:
        add_lora(model, config.lora)
    return model


def kept_dtype(config: RunConfig, low: bool) -> torch.dtype:
    """How the model's own weights are kept: fp32; bf16 as train.weights says, or frozen where products run in bf16."""
    return torch.bfloat16 if config.train.weights == "bf16" or (config.lora.rank and low) else torch.float32


def fill_shards(sharded: "ShardedModel", folder: Path) -> None:
    """Copy this rank's shards of the weights in `folder`; the full weights are loaded into host memory.

    They keep their stored dtype; with an adapter, they get the dtype of the frozen weights. The adapter is left alone.
    """
    lora = sharded.model.lora
    dtype = None if lora is None else sharded.model.embed_tokens.weight.dtype
    weights = dict(load_model(folder, "cpu", dtype).named_parameters())
    with torch.no_grad():
        for name, shard in sharded.shards.items():
            if lora is not None and name not in weights:
                continue
            for local, full in shard.layout.slices():
                shard.local[local].copy_(weights[name][full])


def chat_template(config: RunConfig) -> str:
    """How a prompt is written: the recipe's way, else that of the weights the run starts from, else the default."""
    if config.data.chat_template is not None:
        return config.data.chat_template
    folder = init_folder(config)
    if folder is not None and (folder / GENERATION).is_file():
        try:
            return str(json.loads((folder / GENERATION).read_text(encoding="utf-8")).get("chat_template", DEFAULT))
        except (ValueError, AttributeError):
            raise UserError(f"{folder / GENERATION} is no JSON object; fix it or remove it") from None
    return DEFAULT


def publish(model: LanguageModel, out: Path, config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write `out`/weights, an adapter merged into them; the adapter alone goes to `out`/adapter. `model` is plain then."""
    if model.lora is not None:
        folder = init_folder(config)
        save_adapter(model, out / "adapter", base=None if folder is None else str(folder.absolute()))
        merge_lora(model)
    generation = {"chat_template": chat_template(config)} if config.data.format == "chat" else None
    save_model(model, out / "weights", tokenizer=tokenizer.path, dtype=dtype, generation=generation)
