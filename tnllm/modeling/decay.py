"""The decay of each head in each layer, as fp32 log-decays, and LRPE's initial frequencies.

    log_decay(config, layer=0)    # [H] fp32, <= 0; the decay of head h is exp(log_decay[h])
    initial_theta(config)         # [H, 1, d] fp32

The released checkpoints use geometric slopes 2^(-8(h+1)/H) times (1 - l/(L-1) + 1e-5). The papers print another
formula (arXiv 2307.14995 Eq. 2): 8h/H times (1 - l/L). Both are here; the first is the default.
"""

import math

import torch
from torch import Tensor

from tnllm.modeling.config import ModelConfig


def geometric_slopes(num_heads: int) -> list[float]:
    """Slopes a_h > 0 of the released models, for any number of heads.

    If the count is not a power of two: the slopes of the next lower power, then every other slope of the next higher one,
    as the checkpoints' code does.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += geometric_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def log_decay(config: ModelConfig, layer: int) -> Tensor:
    """Return [H] fp32 log-decays of `layer`, computed in Python floats and rounded once.

    Never a function of the model's dtype: in bfloat16 the decays of the late layers would round to exactly 1.
    """
    if config.position in ("lrpe", "ape"):
        return torch.zeros(config.num_heads, dtype=torch.float32)
    if config.decay_slopes == "geometric":
        slopes = geometric_slopes(config.num_heads)
        # A single layer has the factor of layer 0.
        depth = layer / (config.num_layers - 1) if config.num_layers > 1 else 0.0
        factor = 1.0 - depth + 1e-5 if config.decay_temperature else 1.0
    else:
        slopes = [8.0 * head / config.num_heads for head in range(config.num_heads)]
        factor = 1.0 - layer / config.num_layers if config.decay_temperature else 1.0
    return torch.tensor([-slope * factor for slope in slopes], dtype=torch.float32)


def initial_theta(config: ModelConfig) -> Tensor:
    """Return LRPE's [H, 1, d] fp32 starting frequencies: 10000^(-2j/M) over the flat index j, head-major."""
    count = config.model_dim
    flat = [10_000.0 ** (-2.0 * index / count) for index in range(count)]
    return torch.tensor(flat, dtype=torch.float32).view(config.num_heads, 1, config.head_dim)
