"""The architecture: config, layers, model, recurrent state, weights.

from tnllm.modeling import load_model
model = load_model("runs/tiny", device="cpu", dtype=torch.float32)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnllm.modeling.weights import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # On demand: the config alone, which commands read early, must not load torch.
    if name == "load_model":
        from tnllm.modeling.weights import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
