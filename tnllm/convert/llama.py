"""The softmax baseline as a folder of transformers' own Llama classes, or Qwen3's with `qk_norm`: no code is shipped.

    check_llama(config)                                   # raises UserError for what those classes cannot compute
    outputs = llama_outputs(source, dtype, make)          # tnllm's names → tensors of the result
    values = config_values(config, dtype, generation, max_position=2048)

q, k and v are stored apart there. A norm without parameters becomes one whose weight is 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnllm import __version__
from tnllm.convert.source import Source
from tnllm.convert.writer import Output
from tnllm.errors import UserError
from tnllm.modeling.config import ModelConfig

# Parts of tnllm's names → transformers'; a matrix of several parts is cut into as many, by rows.
_PARTS = {
    "token_mixer.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "token_mixer.out_proj": ("self_attn.o_proj",),
    "token_mixer.query_norm": ("self_attn.q_norm",),
    "token_mixer.key_norm": ("self_attn.k_norm",),
    "token_norm": ("input_layernorm",),
    "channel_norm": ("post_attention_layernorm",),
    "channel_mixer.l1": ("mlp.gate_proj",),
    "channel_mixer.l2": ("mlp.up_proj",),
    "channel_mixer.l3": ("mlp.down_proj",),
    "final_norm": ("norm",),
}


def check_llama(config: ModelConfig) -> None:
    """Raise UserError for a baseline that transformers' classes cannot compute."""
    for key, wrong, allowed in (("norm", "layernorm", "rmsnorm, srmsnorm"), ("scale_embedding", True, "false")):
        if getattr(config, key) == wrong:
            raise UserError(
                f"transformers' Llama cannot compute model.{key} {wrong!r}; allowed: {allowed}. Convert --to tnllm instead"
            )


def llama_names(name: str) -> list[str]:
    """transformers' names of the tensors that a parameter of tnllm becomes."""
    if name.startswith("lm_head."):
        return [name]
    for own, parts in _PARTS.items():
        if f".{own}." in f".{name}":
            return [f"model.{name.replace(own, part)}" for part in parts]
    return [f"model.{name}"]


def llama_outputs(
    source: Source, dtype: torch.dtype, maker: Callable[[str], Callable[[], Tensor]]
) -> dict[str, list[Output]]:
    """The tensors of the result by tnllm's names; `maker(name)` makes the complete tensor of a name."""
    by_name = {}
    for name, shape in source.expected.items():
        names = llama_names(name)
        rows = (shape[0] // len(names), *shape[1:])
        by_name[name] = [
            Output(key, rows, dtype, _rows_of(maker(name), index * rows[0], rows[0])) for index, key in enumerate(names)
        ]
    if source.config.norm == "srmsnorm":
        width, layers = source.config.model_dim, range(source.config.num_layers)
        norms = [f"layers.{layer}.{norm}.weight" for layer in layers for norm in ("token_norm", "channel_norm")]
        for name in (*norms, "final_norm.weight"):
            by_name[name] = [Output(llama_names(name)[0], (width,), dtype, lambda: torch.ones(width, dtype=dtype))]
    return by_name


def _rows_of(make: Callable[[], Tensor], first: int, count: int) -> Callable[[], Tensor]:
    return lambda: make()[first : first + count]


def config_values(
    config: ModelConfig, dtype: torch.dtype, generation: dict[str, Any], max_position: int
) -> dict[str, Any]:
    """Return the values of config.json; `generation` are those of generation_config.json."""
    name = str(dtype).removeprefix("torch.")
    model_type = "qwen3" if config.qk_norm else "llama"
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        # The factor of queries and keys follows from these.
        scaling["original_max_position_embeddings"] = config.rope_length
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "tnllm_version": __version__,
        # transformers 5 reads dtype, transformers 4 torch_dtype.
        "dtype": name,
        "torch_dtype": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.glu_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "linear" if config.glu_activation == "none" else config.glu_activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        **({} if config.rope_scaling == "none" else {"rope_scaling": scaling}),
        "max_position_embeddings": int(max_position * config.rope_factor),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": generation.get("bos_token_id"),
        "eos_token_id": generation.get("eos_token_id"),
        "use_cache": True,
    }
