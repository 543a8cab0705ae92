"""The config.json of the released checkpoints, read and written.

    config = from_official_config(values, Path("TransNormerLLM-385M/config.json"))
    values = to_official_config(config, generation, dtype)       # `generation` is generation_config.json

v1 and v2 stack q, k, v, u in the rows of `qkvu_proj`. v3 (15B) has `qkv_proj` and a gate of rank `gate_dim`. This project
never saw a v3 file: the order of its rows (all q, all k, all v), the names of its gate (`output_gate.0`, `output_gate.1`),
no activation of v and a norm before the gate are a best guess from its parameter count and the authors' later code.
"""

from pathlib import Path
from typing import Any

import torch

from tnllm.errors import UserError
from tnllm.modeling.config import ModelConfig, make_config

MODEL_TYPE = "transnormer"
V3_NOTE = (
    "v3: no official logits were available to check against; the order of q, k, v, the gate's keys, the activation of v "
    "and the position of the norm are a best guess"
)
# Keys of the released configuration class with its defaults (the 385M); None where no default affects the model.
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
    # Known keys that affect neither the parameters nor the function.
    **dict.fromkeys(
        ("add_bos_token", "use_cache", "bos_token_id", "eos_token_id", "linear_use_lrpe", "model_type", "architectures",
         "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_attn_implementation_autoset",
         "quantization_config", "initializer_range")
    ),
}  # fmt: skip
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "none": "none", "1+elu": "1+elu", "relu": "relu"}


def from_official_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """Return the ModelConfig of a released config.json. Raises UserError for anything that no released version has."""
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UserError(f"{path} has {unknown[0]!r}, which no released version (v1, v2, v3) has; its layout is unknown")
    given: dict[str, Any] = {**{key: value for key, value in _KEYS.items() if value is not None}, **values}
    get = given.get
    width, layers = get("decoder_embed_dim"), get("decoder_layers")
    fixed = {"hidden_dim": width, "norm_type": "simplermsnorm", "bias": False}
    for key, wanted in fixed.items():
        if get(key) != wanted:
            raise UserError(f"{path}: {key} is {get(key)!r}; every released version has {wanted!r}")
    if get("quantization_config") is not None:
        raise UserError(f"{path} says that the weights are quantized; convert the weights that they were made from")
    if get("linear_act_fun") not in _ACTIVATIONS:
        raise UserError(f"{path}: linear_act_fun is {get('linear_act_fun')!r}; allowed: {', '.join(_ACTIVATIONS)}")
    if not isinstance(width, int) or not isinstance(layers, int):
        raise UserError(f"{path}: decoder_embed_dim and decoder_layers must be whole numbers")
    lrpe = get("linear_use_lrpe_list") or [1] + [0] * (layers - 1)
    positions = {(1,) + (0,) * (layers - 1): "mix", (1,) * layers: "lrpe-d", (0,) * layers: "decay"}
    position = positions.get(tuple(lrpe)) if isinstance(lrpe, list) else None
    if position is None:
        raise UserError(f"{path}: linear_use_lrpe_list must have {layers} entries, 1 in the first, in all or in none")
    gate = {} if get("gate_dim") is None else {"gate": "low-rank", "gate_dim": get("gate_dim")}
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
            **gate,
        }
    )


def to_official_config(config: ModelConfig, generation: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a released config.json. Raises UserError for a model that it cannot describe."""
    v3 = config.version == "v3"
    fixed = {
        "kind": "transnormer",
        "softmax_every": 0,
        "decay_slopes": "geometric",
        "decay_temperature": True,
        "glu_activation": "none",
        "norm": "srmsnorm",
        "norm_eps": 1e-6,
        "value_activation": "none",
        "norm_position": "attention",
        "gate": "low-rank" if v3 else "full",
    }
    for key, wanted in fixed.items():
        if getattr(config, key) != wanted:
            raise UserError(
                f"the released layout cannot describe model.{key} {getattr(config, key)!r} (it always means {wanted!r}); "
                "convert --to hf instead"
            )
    if config.position not in ("mix", "lrpe-d", "decay"):
        raise UserError(
            f"the released layout cannot describe model.position {config.position!r}; convert --to hf instead"
        )
    return {
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transnormer.TransnormerConfig",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.model_dim,
        "decoder_layers": config.num_layers,
        "decoder_attention_heads": config.num_heads,
        "hidden_dim": config.model_dim,
        "glu_dim": config.glu_dim,
        **({"gate_dim": config.gate_dim} if v3 else {}),
        "linear_act_fun": "swish" if config.activation == "silu" else config.activation,
        "linear_use_lrpe_list": [int(config.uses_lrpe(layer)) for layer in range(config.num_layers)],
        "no_scale_embedding": not config.scale_embedding,
        "norm_type": "simplermsnorm",
        "bias": False,
        "init_std": config.init_std,
        "add_bos_token": bool(generation.get("add_bos_token", False)),
        "use_cache": True,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": generation.get("bos_token_id", 1),
        "eos_token_id": generation.get("eos_token_id", 2),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
