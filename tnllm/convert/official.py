"""The released layout: its config.json, its keys, and what is not known of v3, as values that can be set.

    config = from_official_config(values, "TransNormerLLM-385M/config.json", layout)
    values = to_official_config(config, settings, dtype)
    keys = official_names(config, layout)        # our name → key in the file

v1, v2: `qkvu_proj` holds q, k, v, u one after another. v3 (15B) holds q, k, v and a gate of rank `gate_dim`; its file was
never seen by this project, so its order of rows, its gate's key names, its activation of v and the place of its norm are
`Layout` values. The defaults are the best guess, from the parameter count and the authors' later code.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tnllm.errors import UserError, did_you_mean
from tnllm.modeling.config import ModelConfig, make_config
from tnllm.modeling.hf_names import to_official

MODEL_TYPE = "transnormer"
V3_NOTE = (
    "v3: no official logits were available to check against; the order of q, k, v, the gate's keys, the activation of v "
    "and the place of the norm are a best guess (see --set)"
)


@dataclass(frozen=True)
class Layout:
    """What is not known for certain of v3. Strings, set by `--set KEY=VALUE`."""

    qkv_layout: str = (
        "split"  # rows of qkv_proj: split is all q, all k, all v; per-head is q, k, v of head 0, of head 1...
    )
    gate_in: str = "output_gate.0"  # key of the gate's first matrix (gate_dim, D), below token_mixer
    gate_out: str = "output_gate.1"  # key of its second one (D, gate_dim)
    value_activation: str = "none"  # of v: none, silu
    norm_position: str = "attention"  # the mixer's norm: attention (before the gate), gate (after it), output

    def with_settings(self, settings: list[str]) -> "Layout":
        """Apply `KEY=VALUE` settings. Raises UserError for an unknown key or value."""
        names = [field.name for field in fields(self)]
        allowed = {
            "qkv_layout": ("split", "per-head"),
            "value_activation": ("none", "silu"),
            "norm_position": ("attention", "gate", "output"),
        }
        layout = self
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in names or not equals or not value:
                hint = did_you_mean(key, names)
                raise UserError(f"--set {setting}: give KEY=VALUE with one of {', '.join(names)}{hint}")
            if value not in allowed.get(key, (value,)):
                raise UserError(f"--set {setting}: allowed for {key}: {', '.join(allowed[key])}")
            layout = replace(layout, **{key: value})
        return layout


# The released configuration class's keys, with its defaults (the 385M); None: no default that shapes anything.
_KEYS: dict[str, Any] = {
    "vocab_size": 64_000,
    "decoder_embed_dim": 1024,
    "decoder_layers": 24,
    "decoder_attention_heads": 8,
    "hidden_dim": 1024,
    "glu_dim": 2816,
    "gate_dim": None,
    "linear_act_fun": "silu",
    "linear_use_lrpe_list": None,
    "no_scale_embedding": False,
    "norm_type": "simplermsnorm",
    "bias": False,
    "init_std": 0.02,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    # Known, and without influence on the parameters or the function.
    **dict.fromkeys(
        ("add_bos_token", "use_cache", "bos_token_id", "eos_token_id", "linear_use_lrpe", "model_type", "architectures",
         "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_attn_implementation_autoset",
         "quantization_config", "initializer_range")
    ),
}  # fmt: skip
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "none": "none", "1+elu": "1+elu", "relu": "relu"}


def from_official_config(values: dict[str, Any], path: object, layout: Layout) -> ModelConfig:
    """The ModelConfig of a released config.json. Raises UserError for anything no released version has."""
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UserError(f"{path} has {unknown[0]!r}, which no released version (v1, v2, v3) has; its layout is unknown")
    given: dict[str, Any] = {**{key: value for key, value in _KEYS.items() if value is not None}, **values}
    get = given.get
    width, layers = get("decoder_embed_dim"), get("decoder_layers")
    fixed = {"hidden_dim": width, "norm_type": "simplermsnorm", "bias": False}
    for key, wanted in fixed.items():
        if get(key) != wanted:
            raise UserError(f"{path}: {key} is {get(key)!r}; every released version has {wanted!r}, so this is unknown")
    if get("quantization_config") is not None:
        raise UserError(f"{path} says that the weights are quantized; convert the ones they were made from")
    if get("linear_act_fun") not in _ACTIVATIONS:
        raise UserError(f"{path}: linear_act_fun is {get('linear_act_fun')!r}; allowed: {', '.join(_ACTIVATIONS)}")
    if not isinstance(width, int) or not isinstance(layers, int):
        raise UserError(f"{path}: decoder_embed_dim and decoder_layers must be whole numbers")
    lrpe = get("linear_use_lrpe_list") or [1] + [0] * (layers - 1)
    positions = {(1,) + (0,) * (layers - 1): "mix", (1,) * layers: "lrpe-d", (0,) * layers: "decay"}
    position = positions.get(tuple(lrpe)) if isinstance(lrpe, list) else None
    if position is None:
        raise UserError(f"{path}: linear_use_lrpe_list must have {layers} entries, 1 in the first, in all or in none")
    gated = get("gate_dim") is not None
    return make_config(
        {
            "vocab_size": get("vocab_size"),
            "num_layers": layers,
            "model_dim": width,
            "num_heads": get("decoder_attention_heads"),
            "glu_dim": width if get("glu_dim") == -1 else get("glu_dim"),
            "position": position,
            "activation": _ACTIVATIONS[given["linear_act_fun"]],
            "scale_embedding": not get("no_scale_embedding"),
            "tie_embeddings": get("tie_word_embeddings"),
            "init_std": get("init_std"),
            "pad_token_id": get("pad_token_id"),
            **({"gate": "low-rank", "gate_dim": get("gate_dim")} if gated else {}),
            **({"value_activation": layout.value_activation, "norm_position": layout.norm_position} if gated else {}),
        }
    )


def to_official_config(config: ModelConfig, settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A released config.json. Raises UserError for a choice that layout has no place for."""
    v3 = config.version == "v3"
    fixed = {
        "kind": "transnormer",
        "decay_slopes": "geometric",
        "decay_temperature": True,
        "glu_activation": "none",
        "norm": "srmsnorm",
        "norm_eps": 1e-6,
        **({} if v3 else {"value_activation": "none", "norm_position": "attention", "gate": "full"}),
    }
    for key, wanted in fixed.items():
        if getattr(config, key) != wanted:
            raise UserError(
                f"the released layout has no place for model.{key} {getattr(config, key)!r} (it always means {wanted!r}); "
                "convert --to hf instead"
            )
    if config.position not in ("mix", "lrpe-d", "decay"):
        raise UserError(
            f"the released layout has no place for model.position {config.position!r}; convert --to hf instead"
        )
    layers = config.num_layers
    lrpe = [int(config.uses_lrpe(layer)) for layer in range(layers)]
    name = "Transnormer"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_transnormer.{name}Config",
            "AutoModelForCausalLM": f"modeling_transnormer.{name}ForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.model_dim,
        "decoder_layers": layers,
        "decoder_attention_heads": config.num_heads,
        "hidden_dim": config.model_dim,
        "glu_dim": config.glu_dim,
        **({"gate_dim": config.gate_dim} if v3 else {}),
        "linear_act_fun": "swish" if config.activation == "silu" else config.activation,
        "linear_use_lrpe_list": lrpe,
        "no_scale_embedding": not config.scale_embedding,
        "norm_type": "simplermsnorm",
        "bias": False,
        "init_std": config.init_std,
        "add_bos_token": bool(settings.get("add_bos_token", False)),
        "use_cache": True,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": settings.get("bos_token_id", 1),
        "eos_token_id": settings.get("eos_token_id", 2),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def official_name(name: str, layout: Layout) -> str:
    """Our parameter name → the released key."""
    key = to_official(name)
    for ours, theirs in (("output_gate.0", layout.gate_in), ("output_gate.1", layout.gate_out)):
        key = key.replace(f"token_mixer.{ours}.", f"token_mixer.{theirs}.")
    return key


def permutes(name: str, layout: Layout) -> bool:
    """Whether this parameter of ours has its rows in another order in the file."""
    return layout.qkv_layout == "per-head" and name.endswith("token_mixer.qkv_proj.weight")


def to_split(value: Tensor, num_heads: int) -> Tensor:
    """[(H, 3, d), D] rows → [(3, H, d), D]."""
    rows = value.shape[0]
    return value.view(num_heads, 3, -1, value.shape[1]).transpose(0, 1).reshape(rows, -1)


def to_per_head(value: Tensor, num_heads: int) -> Tensor:
    """The inverse of `to_split`."""
    rows = value.shape[0]
    return value.view(3, num_heads, -1, value.shape[1]).transpose(0, 1).reshape(rows, -1)
