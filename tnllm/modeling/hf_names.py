"""Parameter names of the released checkpoints (their `TransnormerForCausalLM` class) to ours and back.

The only difference is the prefix `model.` on all names but the head's. A released v1 or v2 checkpoint has exactly 5 L + 3
keys, the tied head included. Hugging Face folders that `tnllm convert` writes use the released names, and a flat
config.json with this package's keys, which `from_hf_config` reads.
"""

from typing import Any

from tnllm.modeling.config import ROPE_KEYS, ModelConfig

HEAD = "lm_head.weight"
# What other programs look for in a Hugging Face config.json → our key.
ALIASES = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "glu_dim",
}
# Some released files hold these keys, which mean nothing: dropped on load.
IGNORED = ("model.decoder.version", "decoder.version")


def to_official(name: str) -> str:
    """Our parameter name → the released one."""
    return name if name == HEAD else f"model.{name}"


def from_official(name: str) -> str:
    """The released parameter name → ours."""
    return name.removeprefix("model.")


def from_hf_config(values: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig values from the config.json of a Hugging Face folder that this package wrote."""
    values = {**{key: values[alias] for alias, key in ALIASES.items() if alias in values}, **values}
    # transformers gives every config a rope_scaling of its own.
    own = {key: values[key] for key in ModelConfig.model_fields if key in values and key not in ROPE_KEYS}
    return {**own, "kind": "transnormer", "tie_embeddings": values.get("tie_word_embeddings", True)}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of such a config.json that describe the model, without aliases."""
    own = config.model_dump(exclude={"kind", "tie_embeddings", *ROPE_KEYS})
    return {**own, "tie_word_embeddings": config.tie_embeddings}


DEFAULTS = to_hf_config(ModelConfig())
