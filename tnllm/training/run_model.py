"""The model of a run: how it starts (new weights, those of a folder, an adapter on them), and how it is published.

model = make_model(config.model, lora, train, init, device, low)    # with lora and recomputation applied
model = make_meta_model(config.model, config.lora, dtype)   # the same shapes on the meta device, for a mesh
publish(model, out, tokenizer, dtype, base, template)   # weights/, and adapter/ if there is one
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tnllm.chat_template import DEFAULT
from tnllm.files import read_json
from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.modeling.lora import add_lora, merge_lora, save_adapter
from tnllm.modeling.model import LanguageModel, build_model
from tnllm.modeling.weights import GENERATION, load_model, save_model
from tnllm.training.sections import TrainSection

if TYPE_CHECKING:
    from tnllm.parallel.parallelize import ShardedModel


def make_model(
    config: ModelConfig, lora: LoraConfig, train: TrainSection, init: Path | None, device: torch.device, low: bool
) -> LanguageModel:
    """Trainable weights on `device`, in fp32 or as train.weights says; with an adapter, the base weights are frozen.

    `init`: the weights to start from (None: new ones). `low`: products run in bf16. Frozen weights are then kept in bf16,
    since no updates are added to them.
    """
    dtype = weights_dtype(train, lora, low)
    if init is None:
        model = build_model(config, device, dtype, seed=train.seed)
    else:
        model = load_model(init, device, dtype).train().requires_grad_(True)
    if lora.rank:
        add_lora(model, lora, seed=train.seed)
    model.set_activation_checkpointing(train.activation_checkpointing)
    return model


def make_meta_model(config: ModelConfig, lora: LoraConfig, dtype: torch.dtype) -> LanguageModel:
    """The model of `make_model` on the meta device, for `parallelize`."""
    model = build_model(config, "meta", dtype)
    if lora.rank:
        add_lora(model, lora)
    return model


def weights_dtype(train: TrainSection, lora: LoraConfig, low: bool) -> torch.dtype:
    """The dtype weights are stored in: fp32; bf16 if train.weights says so, or if frozen while products run in bf16."""
    return torch.bfloat16 if train.weights == "bf16" or (lora.rank and low) else torch.float32


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


def chat_template(given: str | None, folder: Path | None) -> str:
    """The form of a prompt: as `given` in data.chat_template, else that of the weights in `folder`, else the default."""
    if given is not None:
        return given
    if folder is not None and (folder / GENERATION).is_file():
        return str(read_json(folder / GENERATION).get("chat_template", DEFAULT))
    return DEFAULT


def publish(
    model: LanguageModel, out: Path, tokenizer: Path, dtype: torch.dtype, base: Path | None, template: str | None
) -> None:
    """Write `out`/weights; an adapter goes to `out`/adapter and is merged into `model` first, in place.

    `base`: the weights that the run started from. `template`: the form of a prompt, if the model was trained to chat.
    """
    if model.lora is not None:
        save_adapter(model, out / "adapter", base=None if base is None else str(base.absolute()))
        merge_lora(model)
    generation = None if template is None else {"chat_template": template}
    save_model(model, out / "weights", tokenizer=tokenizer, dtype=dtype, generation=generation)
