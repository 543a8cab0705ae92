"""A model ready to generate: weights, tokenizer and the defaults that ship beside them.

loaded = load("runs/tiny", device="auto", dtype="auto")    # None: the model that ships in the package
params = loaded.params(temperature=0.5)                    # generation_config.json, overridden by these
ids = loaded.encode("Once upon a time")
"""

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from tnllm import chat_template, hub
from tnllm.device import pick_device
from tnllm.errors import UserError
from tnllm.files import read_json
from tnllm.generation.sampler import SamplingParams
from tnllm.modeling.cpu_step import pack_weights
from tnllm.modeling.lora import merge_adapter, read_adapter
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import GENERATION, load_model, read_config, resolve_model
from tnllm.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class LoadedModel:
    """Everything `generate` needs. `sampling` holds fields of SamplingParams."""

    folder: Path
    model: LanguageModel
    tokenizer: Tokenizer
    sampling: dict[str, Any]
    eos_ids: tuple[int, ...]
    bos_id: int
    add_bos: bool
    chat_template: str
    # Whether the weights name their turn format, as those of a model do that was trained on conversations.
    is_chat_tuned: bool = False

    def params(self, **options: Any) -> SamplingParams:
        """The model's defaults, overridden by `options`. Raises UserError."""
        return SamplingParams.of({**self.sampling, **options})

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids; at the `start` of a text with the begin token if the model wants one or the text is empty."""
        ids = self.tokenizer.encode(text)
        return self.at_start(ids) if start else ids

    def at_start(self, ids: list[int]) -> list[int]:
        """`ids` as the start of a text: after the begin token if the model wants one or there are none."""
        return [self.bos_id, *ids] if self.add_bos or not ids else ids


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The dtype of --dtype; None: the stored one. Raises UserError for one that is not offered on this device."""
    if dtype not in ("auto", *_DTYPES):
        # Attention has no scale by design and overflows float16's range.
        raise UserError(f"dtype is {dtype!r}; allowed: auto, {', '.join(_DTYPES)}")
    if dtype == "int8" and device.type != "cpu":
        raise UserError(
            f"--dtype int8 is for a CPU, and the device is {device}; give --device cpu, or --dtype bfloat16"
        )
    return _DTYPES.get(dtype, torch.float32 if device.type == "cpu" else None)


def load(
    model: Path | str | None = None, device: str = "auto", dtype: str = "auto", adapter: Path | str | None = None
) -> LoadedModel:
    """Load a weights folder, run folder or hub name; `adapter`, a folder in PEFT's format, is merged into it.

    device: auto (the GPU where there is one), cpu, cuda or cuda:N. dtype: auto (float32 on CPU, or int8 of a folder in
    int8; the stored one on a GPU, bfloat16 of such a folder), float32, bfloat16, or on a CPU int8
    (`tnllm.modeling.int8`). Raises UserError for anything else and for folders that hold no model.
    """
    where = pick_device(device)
    wanted = pick_dtype(dtype, where)
    folder = resolve_model(model)
    if dtype == "auto" and read_config(folder)[1] == torch.int8:
        wanted = torch.int8 if where.type == "cpu" else torch.bfloat16
    path = folder / GENERATION
    settings = read_json(path) if path.is_file() else {}
    tokenizer = Tokenizer.load(folder)
    weights = load_model(folder, where, torch.float32 if adapter and wanted == torch.int8 else wanted)
    if adapter is not None:
        merge_adapter(weights, hub.local(adapter))
        if wanted == torch.int8:
            weights.quantize_int8()
    if where.type == "cpu":
        pack_weights(weights)
    sampling = {key: settings[key] for key in _SAMPLING if settings.get(key) is not None}
    if settings.get("max_new_tokens") is not None:
        sampling["max_tokens"] = settings["max_new_tokens"]
    if settings.get("do_sample") is False:
        sampling["temperature"] = 0
    try:
        SamplingParams.of(sampling)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    eos = settings.get("eos_token_id")
    bos = settings.get("bos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (tokenizer.eos_id if eos is None else eos,)
    bos_id = tokenizer.bos_id if bos is None else bos
    template, is_chat_tuned = settings.get("chat_template", chat_template.DEFAULT), "chat_template" in settings
    add_bos = bool(settings.get("add_bos_token", False))
    return LoadedModel(folder, weights, tokenizer, sampling, eos_ids, bos_id, add_bos, template, is_chat_tuned)


def with_adapter(loaded: LoadedModel, adapter: Path | str) -> LoadedModel:
    """The model with an adapter merged into copies of the weights that it changes; all others are shared.

    Raises UserError as `load` does.
    """
    folder = Path(hub.local(adapter))
    if loaded.model.is_int8:
        raise UserError("adapters beside int8 weights are not supported; give --dtype float32")
    changed = read_adapter(folder).pairs
    shared = {id(weight): weight for name, weight in loaded.model.named_parameters() if name not in changed}
    model = copy.deepcopy(loaded.model, shared)
    merge_adapter(model, folder)
    return replace(loaded, model=model)


# The keys that generation_config.json and SamplingParams share.
_OWN = {"n", "seed", "stop", "logprobs", "max_tokens", "ignore_eos", "logit_bias", "grammar", "prompt_lookup"}
_SAMPLING = {field.name for field in fields(SamplingParams)} - _OWN
