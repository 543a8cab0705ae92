"""Configuration of a TransNormerLLM in the Hugging Face layout.

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)

The keys are those of tnllm's ModelConfig; DEFAULTS says what each one means. The common Hugging Face names
(`hidden_size`, `num_hidden_layers`, ...) are aliases of them.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from tnllm.modeling.config import ModelConfig
from tnllm.modeling.hf_names import ALIASES, DEFAULTS


class TnllmConfig(PretrainedConfig):
    """Everything that determines the parameters or the function of the model."""

    model_type = "tnllm"
    kind = "transnormer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = ALIASES

    head_dim = ModelConfig.head_dim

    num_softmax = ModelConfig.num_softmax

    is_softmax = ModelConfig.is_softmax

    uses_lrpe = ModelConfig.uses_lrpe

    key_dim = ModelConfig.key_dim

    def __init__(self, **kwargs: Any) -> None:
        """Keys that are not given have their value in DEFAULTS. Raises ValueError if two names of a key contradict."""
        for alias, key in self.attribute_map.items():
            if alias in kwargs:
                value = kwargs.pop(alias)
                if kwargs.setdefault(key, value) != value:
                    raise ValueError(f"{alias} is {value} but {key} is {kwargs[key]}; they are names of one value")
        use_cache = kwargs.pop("use_cache", True)
        super().__init__(**{"bos_token_id": 1, "eos_token_id": 2, **DEFAULTS, **kwargs})
        self.use_cache = use_cache  # transformers 5 keeps it from configs, as a setting of generation

    def to_dict(self) -> dict[str, Any]:
        """All values, also under their common Hugging Face names: programs read those from config.json."""
        values = super().to_dict()
        return {**values, **{alias: values[key] for alias, key in self.attribute_map.items() if key in values}}
