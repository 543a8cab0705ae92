"""The released model's forward pass restated in plain float64 torch, straight from its description, sharing no code.

Slow and quadratic on purpose: one function a reader can hold against the paper.
"""

import math

import torch


def slopes(num_heads: int) -> list[float]:
    def power_of_two(n: int) -> list[float]:
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(num_heads).is_integer():
        return power_of_two(num_heads)
    closest = 2 ** math.floor(math.log2(num_heads))
    return power_of_two(closest) + slopes(2 * closest)[0::2][: num_heads - closest]


def srms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def forward(weights: dict, config, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [B, T] → logits [B, T, V]; `weights` uses the released names, float64."""
    heads, width, layers = config.num_heads, config.model_dim, config.num_layers
    head_dim = width // heads
    batch, length = tokens.shape
    x = weights["model.embed_tokens.weight"][tokens]
    if config.scale_embedding:
        x = x * width**0.5
    step = torch.arange(length)
    distance = (step[:, None] - step[None, :]).double()
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        y = srms(x)
        if config.gate == "full":
            q, k, v, gate = (y @ weights[f"{prefix}.token_mixer.qkvu_proj.weight"].T).split(width, dim=-1)
        else:
            q, k, v = (y @ weights[f"{prefix}.token_mixer.qkv_proj.weight"].T).split(width, dim=-1)
            low = y @ weights[f"{prefix}.token_mixer.output_gate.0.weight"].T
            gate = torch.sigmoid(low @ weights[f"{prefix}.token_mixer.output_gate.1.weight"].T)
        q, k = q * torch.sigmoid(q), k * torch.sigmoid(k)
        q, k, v = (z.view(batch, length, heads, head_dim).permute(0, 2, 1, 3) for z in (q, k, v))
        if layer == 0:
            theta = weights[f"{prefix}.token_mixer.lrpe.theta"]
            angle = theta * step[:, None].double()
            q = torch.cat([q * angle.cos(), q * angle.sin()], -1)
            k = torch.cat([k * angle.cos(), k * angle.sin()], -1)
        rate = torch.tensor(slopes(heads)).double() * (1 - layer / (layers - 1) + 1e-5)
        decay = torch.exp(-rate[:, None, None] * distance).tril()
        o = ((q @ k.transpose(-1, -2)) * decay) @ v
        o = srms(o.permute(0, 2, 1, 3).reshape(batch, length, width)) * gate
        x = x + o @ weights[f"{prefix}.token_mixer.out_proj.weight"].T
        y = srms(x)
        l1, l2, l3 = (weights[f"{prefix}.channel_mixer.l{i}.weight"] for i in (1, 2, 3))
        x = x + ((y @ l1.T) * (y @ l2.T)) @ l3.T
    return srms(x) @ weights["lm_head.weight"].T
