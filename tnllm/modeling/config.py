"""What a model is: one frozen config, and the presets of the papers and the released checkpoints.

    get_preset("385m")                                # TransNormerLLM-385M as released
    get_preset("385m", kind="transformer")            # the softmax baseline of the same size
    get_preset("385m", gate="none", norm="rmsnorm")   # an ablation

Sources: TransNormerLLM (arXiv 2307.14995), TNL (arXiv 2405.17381) and the configs of the released checkpoints.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tnllm.errors import UserError, did_you_mean

# Of kind transformer alone.
ROPE_KEYS = {"rope_scaling", "rope_factor", "rope_length"}


class ModelConfig(BaseModel):
    """Every choice that shapes the parameters or the function of a model.

    Defaults are the released TransNormerLLM-385M; the values beside them are the papers' ablations.
    """

    # The largest sizes leave room above any model; beyond them numbers overflow, and even counting takes for ever.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["transnormer", "transformer"] = Field(
        "transnormer", description="TransNormerLLM, or the Llama-style softmax baseline of the same size."
    )
    vocab_size: int = Field(
        64_000, ge=1, le=2**24, description="Rows of the embedding; no fewer than the tokenizer's vocabulary."
    )
    num_layers: int = Field(24, ge=1, le=2048, description="Blocks (token mixer + channel mixer).")
    model_dim: int = Field(1024, ge=1, le=2**20, description="Width of the residual stream.")
    num_heads: int = Field(8, ge=1, le=2**16, description="Attention heads; each is model_dim / num_heads wide.")
    softmax_every: int = Field(
        0,
        ge=0,
        le=2048,
        description="Every Nth layer has the baseline's attention and key-value cache; 0: none, 1: all.",
    )
    glu_dim: int = Field(2816, ge=1, le=2**22, description="Inner width of the channel mixer.")
    position: Literal["mix", "lrpe-d", "lrpe", "decay", "ape"] = Field(
        "mix",
        description="mix: LRPE with decay in layer 0, decay alone elsewhere (released). lrpe-d: both in every "
        "layer. lrpe: no decay. decay: no LRPE. ape: learned absolute positions, no decay.",
    )
    decay_slopes: Literal["geometric", "linear"] = Field(
        "geometric", description="geometric: the released checkpoints' 2^(-8(h+1)/H). linear: the papers' printed 8h/H."
    )
    decay_temperature: bool = Field(True, description="Slower decay in deeper layers (the factor 1 - l/L).")
    gate: Literal["full", "low-rank", "none"] = Field(
        "full", description="Output gate: full linear u (v1, v2), sigmoid of a rank-gate_dim product (v3), none."
    )
    gate_dim: int = Field(16, ge=1, le=2**20, description="Rank of the low-rank gate.")
    norm_position: Literal["attention", "gate", "output"] = Field(
        "attention",
        description="The mixer's norm: after attention, before the gate (v1, v2); after the gate; after out_proj.",
    )
    activation: Literal["silu", "none", "1+elu", "relu"] = Field("silu", description="Applied to q and k.")
    value_activation: Literal["none", "silu"] = Field("none", description="Applied to v.")
    glu_activation: Literal["none", "silu"] = Field("none", description="none is SGLU (released); silu is SwiGLU.")
    norm: Literal["srmsnorm", "rmsnorm", "layernorm"] = Field(
        "srmsnorm", description="srmsnorm has no parameters; the other two carry a weight."
    )
    norm_eps: float = Field(1e-6, gt=0, description="Added to the mean square before the root.")
    scale_embedding: bool = Field(True, description="Multiply embeddings by sqrt(model_dim) (v1, v3; not v2).")
    tie_embeddings: bool = Field(True, description="The head is the embedding matrix.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    pad_token_id: int | None = Field(0, ge=0, description="Its embedding row starts at zero.")
    max_position: int = Field(2048, ge=1, le=2**31, description="Rows of the learned positions, for position=ape.")
    rope_base: float = Field(10_000.0, gt=0, description="Base of softmax attention's rotary positions.")
    rope_scaling: Literal["none", "linear", "yarn"] = Field(
        "none",
        description="The baseline beyond the length it was trained at. linear: positions divided by rope_factor (arXiv "
        "2306.15595). yarn: slow channels alone, and sharper scores (arXiv 2309.00071).",
    )
    rope_factor: float = Field(1.0, ge=1, description="How many times rope_length rope_scaling is to reach.")
    rope_length: int = Field(2048, ge=8, le=2**31, description="Tokens of the rows of training, for rope_scaling=yarn.")
    qk_norm: bool = Field(
        False,
        description="RMSNorm with a weight on softmax attention's queries and keys, a head at a time, before rotary.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} must be a multiple of num_heads {self.num_heads}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} must be below vocab_size {self.vocab_size}")
        if self.softmax_every > self.num_layers:
            raise ValueError(
                f"softmax_every {self.softmax_every} is more than num_layers {self.num_layers}, so no layer would have "
                "softmax attention; lower it, or 0 for none"
            )
        if self.qk_norm and not self.num_softmax:
            raise ValueError(f"qk_norm does not apply to kind {self.kind} without softmax_every; remove it")
        if self.rope_scaling != "none" and self.kind != "transformer":
            raise ValueError(f"rope_scaling applies to kind transformer alone, not to {self.kind}; remove it")
        if self.rope_scaling == "yarn" and self.rope_base <= 1:
            raise ValueError(f"rope_scaling yarn needs a rope_base above 1, not {self.rope_base}")
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise ValueError(f"rope_factor {self.rope_factor} needs rope_scaling: linear or yarn")
        if self.num_softmax and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        if self.kind == "transformer":
            changed = [key for key in LINEAR_ONLY if getattr(self, key) != type(self).model_fields[key].default]
            if changed:
                raise ValueError(f"{', '.join(changed)} does not apply to kind transformer; remove it")
        return self

    @property
    def head_dim(self) -> int:
        """Width of a head, and of its values."""
        return self.model_dim // self.num_heads

    @property
    def version(self) -> str:
        """Released family this config belongs to: v1, v2 (no embedding scale) or v3 (low-rank gate)."""
        if self.gate == "low-rank":
            return "v3"
        return "v1" if self.scale_embedding else "v2"

    @property
    def num_softmax(self) -> int:
        """Number of layers with softmax attention, whose state grows with the length."""
        if self.kind == "transformer":
            return self.num_layers
        return self.num_layers // self.softmax_every if self.softmax_every else 0

    @property
    def unset(self) -> set[str]:
        """Keys that files leave out: those of models that do not use them stay what they were before the key."""
        scaling = ROPE_KEYS if self.rope_scaling == "none" else set()
        return scaling | (set() if self.softmax_every else {"softmax_every"})

    def is_softmax(self, layer: int) -> bool:
        """Whether this layer has softmax attention: with softmax_every N the layers N - 1, 2 N - 1, ..."""
        return self.kind == "transformer" or (self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0)

    def uses_lrpe(self, layer: int) -> bool:
        """Whether LRPE applies in this layer; it doubles the key width there."""
        if self.is_softmax(layer):
            return False
        return self.position in ("lrpe-d", "lrpe") or (self.position == "mix" and layer == 0)

    def key_dim(self, layer: int) -> int:
        """Width of q and k as attention sees them."""
        return self.head_dim * (2 if self.uses_lrpe(layer) else 1)


class LoraConfig(BaseModel):
    """A low-rank adapter beside frozen weights (arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(0, ge=0, le=2**16, description="Rank of the adapter; 0: no adapter, all weights are trained.")
    alpha: float = Field(16.0, gt=0, description="The adapter's output is scaled by alpha / rank.")
    targets: tuple[Literal["qkvu_proj", "qkv_proj", "out_proj", "l1", "l2", "l3"], ...] | None = Field(
        None, description="Projections of a block that get an adapter, such as [qkvu_proj, out_proj]. null: all."
    )


# Keys that do not apply to the softmax baseline.
LINEAR_ONLY = (
    "softmax_every",
    "position",
    "decay_slopes",
    "decay_temperature",
    "gate",
    "gate_dim",
    "norm_position",
    "activation",
    "value_activation",
)


def _size(layers: int, dim: int, heads: int, glu: int, **more: Any) -> ModelConfig:
    return ModelConfig(num_layers=layers, model_dim=dim, num_heads=heads, glu_dim=glu, **more)


_PAPER = {"vocab_size": 50_272}  # the vocabulary the papers count with
_V2 = {"scale_embedding": False}
_V3 = {"gate": "low-rank", "vocab_size": 100_280, "pad_token_id": 100_262}

# Name → config. 385m … 15b are released checkpoints; 13b, 65b and 175b exist in the first paper's tables only.
# No integer GLU width gives the 175B's printed count of 173,023,133,696; 32640 = 255 * 128 comes within 0.05 %.
PRESETS: dict[str, ModelConfig] = {
    "tiny": _size(4, 128, 2, 352, vocab_size=8192),
    "demo": _size(10, 256, 4, 640, vocab_size=8192, glu_activation="silu"),
    "385m": _size(24, 1024, 8, 2816),
    "1b": _size(16, 2048, 16, 5632),
    "1b-v2": _size(16, 2048, 16, 5632, **_V2),
    "3b": _size(32, 2560, 20, 6912, **_V2),
    "7b": _size(30, 4096, 32, 11008),
    "7b-v2": _size(30, 4096, 32, 11008, **_V2),
    "13b": _size(36, 5120, 40, 13824, **_PAPER),
    "15b": _size(42, 5120, 40, 15360, **_V3),
    "65b": _size(72, 8192, 64, 22016, **_PAPER),
    "175b": _size(88, 12288, 96, 32640, **_PAPER),
}


def get_preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the preset `name` with `overrides` (ModelConfig fields) applied.

    `kind="transformer"` turns it into the Llama-style baseline of the same widths (SwiGLU, RMSNorm, unscaled embeddings),
    dropping the linear-attention choices.
    Raises UserError for an unknown preset or field, or values that do not fit together.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset is {name!r}; allowed: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    values = PRESETS[name].model_dump()
    if overrides.get("kind") == "transformer":
        values = {key: value for key, value in values.items() if key not in LINEAR_ONLY}
        # What Llama does; a baseline without them would be an easy one to beat.
        values |= {"scale_embedding": False, "glu_activation": "silu", "norm": "rmsnorm"}
    return make_config({**values, **overrides})


def make_config(values: dict[str, Any]) -> ModelConfig:
    """Build a ModelConfig from plain values; a UserError names the first bad key, its value and the nearest key."""
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, ModelConfig.model_fields)
            raise UserError(f"model.{key}: no such key{hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        if not key:
            raise UserError(f"model: {message}") from None
        raise UserError(f"model.{key} is {first['input']!r}: {message}") from None
