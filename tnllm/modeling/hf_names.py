"""Names of the released checkpoints (spelled by their `TransnormerForCausalLM` class) and ours, both ways.

Ours follow theirs, so the map is a prefix: `model.` before everything but the head. A released v1 or v2 checkpoint has
exactly 5 L + 3 keys, the tied head included.
"""

from collections.abc import Iterable

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
