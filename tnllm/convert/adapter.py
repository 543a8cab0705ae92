"""LoRA adapters in PEFT's format, merged into their base weights: W + scale * B A.

    adapter = open_adapter(Path("adapter"))          # adapter_config.json, adapter_model.safetensors
    merged = merge(adapter, source)                  # a Source whose `read` returns merged weights

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. The sum is computed in fp32 and rounded once, when it is
written. Source: LoRA (arXiv 2106.09685).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tnllm.convert.source import Source, with_products
from tnllm.convert.tensors import Info, read_safetensors, safetensors_infos
from tnllm.errors import UserError
from tnllm.files import read_json
from tnllm.modeling.hf_names import from_official

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. `pairs` maps tnllm's parameter names to key and info of A [r, in] and of B [out, r]."""

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, dict[str, tuple[str, Info]]]

    @property
    def base(self) -> Path | None:
        """The base folder that its config names, or None."""
        path = self.config.get("base_model_name_or_path")
        return Path(path) if path else None

    def scale(self, name: str, rank: int) -> float:
        """Factor of B A for one parameter. `alpha_pattern` overrides `lora_alpha` for the modules that it matches."""
        module = name.removesuffix(".weight")
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def open_adapter(folder: Path) -> Adapter:
    """Read config and tensor names. Raises UserError for an adapter that is not plain LoRA."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path, "copy the adapter again")
    if config.get("peft_type") != "LORA" or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(
            f"{path}: peft_type is {config.get('peft_type')!r}; convert merges LORA adapters with a lora_alpha"
        )
    for key, plain in (("use_dora", False), ("fan_in_fan_out", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key, plain) not in (plain, None, []):
            raise UserError(f"{path}: {key} is {config[key]!r}; convert merges only adapters with {key} {plain!r}")
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{file} is missing; the adapter folder is incomplete")
    pairs: dict[str, dict[str, tuple[str, Info]]] = {}
    for key, info in safetensors_infos(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{file} holds {key!r}, which is not a LoRA matrix; convert merges plain LoRA adapters")
        pairs.setdefault(from_official(f"{match[1]}.weight"), {})[match[2]] = (key, info)
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{file} holds only one of the two matrices of {name}; copy the adapter again")
    return Adapter(folder, config, pairs)


def merge(adapter: Adapter, source: Source) -> Source:
    """Return the source with the adapter added as its weights are read, those in fp32.

    Raises UserError where shapes or names differ.
    """
    for name, pair in adapter.pairs.items():
        if name not in source.expected:
            raise UserError(
                f"the adapter changes {name!r}, which {source.folder} does not have; give its own base with --base"
            )
        (rank, width), (height, rank_b) = pair["A"][1].shape, pair["B"][1].shape
        if (height, width) != source.expected[name] or rank != rank_b:
            raise UserError(
                f"the adapter's matrices for {name} make {[height, width]}, the weight in {source.folder} is "
                f"{list(source.expected[name])}; give its own base with --base"
            )

    def product(name: str) -> Tensor:
        a, b = (read_safetensors(info, key).float() for key, info in (adapter.pairs[name][part] for part in "AB"))
        return adapter.scale(name, a.shape[0]) * (b @ a)

    return with_products(source, adapter.pairs, product, str(adapter.folder))
