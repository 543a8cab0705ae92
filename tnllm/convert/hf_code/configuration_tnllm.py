"""Configuration of a TransNormerLLM in the Hugging Face layout.

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)

The keys are those of tnllm's ModelConfig. The common Hugging Face names (`hidden_size`, `num_hidden_layers`, ...) are
aliases of them.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class TnllmConfig(PretrainedConfig):
    """Everything that determines the parameters or the function of the model."""

    model_type = "tnllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "glu_dim",
    }

    def __init__(
        self,
        vocab_size: int = 64_000,
        num_layers: int = 24,
        model_dim: int = 1024,
        num_heads: int = 8,
        glu_dim: int = 2816,
        # mix: LRPE and decay in layer 0, only decay elsewhere. lrpe-d: both in every layer. lrpe: only LRPE.
        # decay: only decay. ape: learned absolute positions, no decay.
        position: str = "mix",
        decay_slopes: str = "geometric",  # geometric: 2^(-8(h+1)/H). linear: 8h/H.
        decay_temperature: bool = True,  # slower decay in deeper layers
        gate: str = "full",  # full: u, without activation (v1, v2). low-rank: sigmoid, rank gate_dim (v3). none.
        gate_dim: int = 16,
        # Norm of the token mixer. attention: before the gate. gate: after it. output: after the output projection.
        norm_position: str = "attention",
        activation: str = "silu",  # of q and k: silu, none, 1+elu, relu
        value_activation: str = "none",  # of v: none, silu
        glu_activation: str = "none",
        norm: str = "srmsnorm",  # srmsnorm (no parameters), rmsnorm, layernorm
        norm_eps: float = 1e-6,
        scale_embedding: bool = True,  # multiply it by sqrt(model_dim); v1 and v3, not v2
        init_std: float = 0.02,
        max_position: int = 2048,  # only for position=ape
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.model_dim = model_dim
        self.num_heads = num_heads
        self.glu_dim = glu_dim
        self.position = position
        self.decay_slopes = decay_slopes
        self.decay_temperature = decay_temperature
        self.gate = gate
        self.gate_dim = gate_dim
        self.norm_position = norm_position
        self.activation = activation
        self.value_activation = value_activation
        self.glu_activation = glu_activation
        self.norm = norm
        self.norm_eps = norm_eps
        self.scale_embedding = scale_embedding
        self.init_std = init_std
        self.max_position = max_position
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.model_dim // self.num_heads

    def uses_lrpe(self, layer: int) -> bool:
        """Whether LRPE applies in this layer; it doubles the key width there."""
        return self.position in ("lrpe-d", "lrpe") or (self.position == "mix" and layer == 0)
