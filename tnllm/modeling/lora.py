"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + (alpha / rank) B A x, with W frozen and A, B trained.

    add_lora(model, LoraConfig(rank=8, alpha=16), seed=0)   # freezes everything else
    save_adapter(model, "adapter", base="runs/base/weights") # PEFT's format
    merge_lora(model)                                        # W += (alpha / rank) B A; a plain model again
    merge_adapter(model, "adapter")                          # the same from an adapter's folder, onto a plain model

A and B are fp32 whatever the base's dtype. They are attached to the projections of a block; a fused projection (q, k, v and
gate in one matrix) gets one pair.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tnllm.errors import RunError, UserError, did_you_mean
from tnllm.files import read_json, written_folder
from tnllm.modeling.config import LoraConfig
from tnllm.modeling.hf_names import from_official, to_official
from tnllm.modeling.model import LanguageModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class LoraLinear(nn.Linear):
    """A linear layer with a frozen weight [out, in] and a trained low-rank product B A that is added to it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        out_features, in_features = base.weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = base.weight
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise the adapter: A uniform by its fan-in, B zero. The weight draws no random numbers."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Outside autocast (sampling) x has the base's dtype, bf16 for example, while A and B are fp32.
        a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, a), b)

    def product(self) -> Tensor:
        """scale * B A, [out, in] fp32: what merging adds to the weight."""
        return self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())


def lora_layers(model: LanguageModel) -> dict[str, LoraLinear]:
    """Module name → layer, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(model: LanguageModel, config: LoraConfig, seed: int = 0) -> None:
    """Freeze `model` and attach an adapter to every target. B starts at zero, so the outputs are unchanged.

    On the meta device nothing is initialised. Raises UserError for a target the model does not have.
    """
    model.requires_grad_(False)
    linears = [
        (f"layers.{number}.{name}", module)
        for number, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in linears))
    for target in config.targets or ():
        if target not in kinds:
            raise UserError(
                f"lora.targets has {target!r}; this model has {', '.join(kinds)}{did_you_mean(target, kinds)}"
            )
    targets = config.targets or [kind for kind in kinds if not kind.isdecimal()]
    device = model.device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for name, module in linears:
        parent, _, kind = name.rpartition(".")
        if kind not in targets:
            continue
        layer = LoraLinear(module, config.rank, config.alpha)
        if generator is not None:
            layer.reset(generator)
        setattr(model.get_submodule(parent), kind, layer)
    model.lora = config


def merge_lora(model: LanguageModel) -> None:
    """Add each product to its weight, rounded once to the weight's dtype, and remove the adapters."""
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() + layer.product())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        parent, _, kind = name.rpartition(".")
        setattr(model.get_submodule(parent), kind, plain)
    model.lora = None


def save_adapter(model: LanguageModel, folder: Path | str, base: str | None = None) -> None:
    """Write PEFT's adapter_config.json and adapter_model.safetensors into a temporary folder and rename it to `folder`.

    `base` names the weights the adapter belongs to. Keys are PEFT's for the Hugging Face form of the model.
    """
    config = model.lora
    assert config is not None, "call add_lora first"
    layers = lora_layers(model)
    tensors = {
        f"base_model.model.{to_official(name)}.lora_{part}.weight": weight.detach().float().cpu().contiguous()
        for name, layer in layers.items()
        for part, weight in (("A", layer.lora_A.weight), ("B", layer.lora_B.weight))
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    with written_folder(Path(folder)) as temporary:
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its settings and, by the parameters that it changes, A [r, in] and B [out, r] in fp32."""

    folder: Path
    settings: dict[str, Any]
    pairs: dict[str, dict[str, Tensor]]

    def product(self, name: str) -> Tensor:
        """scale * B A [out, in], fp32: scale is alpha / r, or alpha / sqrt(r) with use_rslora.

        `alpha_pattern` overrides `lora_alpha` for the modules that it matches.
        """
        a, b = self.pairs[name]["A"], self.pairs[name]["B"]
        alpha = self.settings["lora_alpha"]
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name.removesuffix(".weight")):
                alpha = value
        return alpha / (math.sqrt(len(a)) if self.settings.get("use_rslora") else len(a)) * (b @ a)

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: str, advice: str) -> None:
        """Raise UserError, which ends with `advice`, where names or shapes are not those of `base`."""
        for name, pair in self.pairs.items():
            (rank, width), (height, rank_b) = pair["A"].shape, pair["B"].shape
            if name not in shapes:
                raise UserError(f"the adapter in {self.folder} changes {name!r}, which {base} does not have; {advice}")
            if (height, width) != tuple(shapes[name]) or rank != rank_b:
                raise UserError(
                    f"the matrices for {name} of the adapter in {self.folder} make {[height, width]}, the weight in "
                    f"{base} is {list(shapes[name])}; {advice}"
                )


def merge_adapter(model: LanguageModel, folder: Path | str) -> int:
    """Merge an adapter in PEFT's format into a plain model; returns the number of changed weights.

    Raises as `read_adapter` does, and UserError for an adapter of another model.
    """
    adapter, weights = read_adapter(Path(folder)), dict(model.named_parameters())
    adapter.check({name: tuple(weight.shape) for name, weight in weights.items()}, "this model", "give its own base")
    with torch.no_grad():
        for name in adapter.pairs:
            weights[name].copy_(weights[name].float() + adapter.product(name).to(weights[name].device))
    return len(adapter.pairs)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter in PEFT's format.

    Raises UserError for a folder without one and for one that is not plain LoRA, RunError for a damaged file.
    """
    path, file = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give an adapter's folder, with its {ADAPTER_CONFIG}")
    settings = read_json(path, advice="give an adapter's folder")
    if settings.get("peft_type") != "LORA" or not isinstance(settings.get("lora_alpha"), int | float):
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; allowed: LORA, with a lora_alpha")
    plain = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}
    for key, value in plain.items():
        if settings.get(key) not in (value, None, []):
            raise UserError(f"{path}: {key} is {settings[key]!r}, which is not supported; allowed: {value!r}")
    if not file.is_file():
        raise UserError(f"{file} is missing; the adapter folder is incomplete")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise RunError(f"cannot read {file} ({error.strerror or error}); make it readable or copy it again") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{file} holds {key!r}, which is not a LoRA matrix; only plain LoRA adapters are supported")
        pairs.setdefault(f"{from_official(match[1])}.weight", {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{file} holds only one of the two matrices of {name}; copy the adapter again")
    return Adapter(folder, settings, pairs)
