"""Names of the released checkpoints (spelled by their `TransnormerForCausalLM` class) and ours, both ways.

Ours follow theirs, so the map is a prefix: `model.` before everything but the head. A released v1 or v2 checkpoint has
exactly 5 L + 3 keys, the tied head included. Hugging Face folders that `tnllm convert` writes use the same names, and a
flat config.json with this package's keys, which `from_hf_config` reads.
"""

from collections.abc import Iterable
from typing import Any

from tnllm.modeling.config import ModelConfig

HEAD = "lm_head.weight"
# Present in some released files and meaningless: drop them on load.
IGNORED = ("model.decoder.version", "decoder.version")


def to_official(name: str) -> str:
    """Our parameter name → the released one."""
    return name if name == HEAD else f"model.{name}"


def from_official(name: str) -> str:
    """The released parameter name → ours."""
    return name.removeprefix("model.")


def official_keys(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Keys of a released file holding these parameters; a tied head is listed there, and is not among ours."""
    keys = [to_official(name) for name in names]
    if config.tie_embeddings:
        keys.append(HEAD)
    return keys


def from_hf_config(values: dict[str, Any]) -> dict[str, Any]:
    """The ModelConfig values in the config.json of a Hugging Face folder of ours."""
    own = {key: values[key] for key in ModelConfig.model_fields if key in values}
    return {**own, "kind": "transnormer", "tie_embeddings": values.get("tie_word_embeddings", True)}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    own = config.model_dump(exclude={"kind", "tie_embeddings", "rope_base", "qk_norm"})
    return {**own, "tie_word_embeddings": config.tie_embeddings}
