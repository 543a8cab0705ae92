"""The configuration of an exported folder as vLLM reads it."""

from typing import Any

from tnllm.convert.hf_code import configuration_tnllm


class TnllmConfig(configuration_tnllm.TnllmConfig):
    """Says which layers are softmax, and names the class of a hybrid: vLLM decides by class what it allocates.

    In a module of its own, because vLLM pickles configurations. It has the name of the folder's class, because transformers
    compares names where a folder's own code is loaded in the same process.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_softmax:
            kinds = ("linear_attention", "full_attention")
            self.architectures = ["TnllmHybridForCausalLM"]
            self.layer_types = [kinds[self.is_softmax(layer)] for layer in range(self.num_layers)]
