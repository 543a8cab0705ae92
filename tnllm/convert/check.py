"""Logits of source and result on fixed prompts, computed layer by layer so that one layer is in memory.

    before = reference_logits(config, read, progress)            # the architecture written again in plain torch
    after = block_logits(config, read, progress)                 # this package's layers
    after = exported_logits(config, read, folder, progress)      # the layers in a Hugging Face folder
    after = llama_logits(config, read, folder, progress)         # transformers' layers, for the softmax baseline
    difference, share = compare(before, after)

But for the speeds of rotary positions, the reference shares no code with the layers that it checks; its attention is
quadratic, by definition. `read` takes tnllm's parameter names.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.convert import hf_folder
from tnllm.convert.checksums import Progress
from tnllm.convert.quantize import quiet_import
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.hf_names import HEAD, to_hf_config
from tnllm.modeling.layers import make_norm
from tnllm.modeling.model import Block
from tnllm.modeling.transformer import rotary

Read = Callable[[str], Tensor]
NUM_PROMPTS, PROMPT_TOKENS = 2, 24
# Largest allowed difference relative to the largest logit; docs/numerics.md gives the reasons.
# An int8 graph rounds activations too: random weights move by a third, a trained model by a tenth, a wrong graph by one.
LIMITS = {"same": 1e-4, "int8": 0.25, "int8 graph": 0.5}
# Logits of a text at most, in numbers: half a gigabyte.
_TEXT_LOGITS, _TEXT_ROW = 1 << 27, 512
# Rows of the head that are converted to fp32 and multiplied at a time.
_HEAD_ROWS = 16_384


def prompts(vocab_size: int) -> Tensor:
    """Return the fixed prompts: [P, T] token ids spread over the vocabulary."""
    ids = torch.arange(NUM_PROMPTS * PROMPT_TOKENS).view(NUM_PROMPTS, PROMPT_TOKENS)
    return (ids * 7919 + 101) % vocab_size


def text_rows(ids: Sequence[int], vocab_size: int) -> Tensor:
    """Return the start of a text as [P, T] ids, rows of equal length that are read apart; as many as memory allows."""
    most = min(len(ids), max(2, _TEXT_LOGITS // vocab_size))
    length = min(most, _TEXT_ROW)
    return torch.tensor(ids[: most // length * length]).view(-1, length)


def agreement(before: Tensor, after: Tensor) -> float:
    """Return the share of positions with the same most likely token."""
    return float((before.argmax(-1) == after.argmax(-1)).float().mean())


def nats(logits: Tensor, tokens: Tensor) -> float:
    """Return the cross entropy of tokens [P, T], after the first of each row, summed."""
    losses = (F.cross_entropy(row[:-1], ids[1:], reduction="sum") for row, ids in zip(logits, tokens, strict=True))
    return float(sum(losses))


def compare(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and its share of the largest logit; infinity if a logit is not finite."""
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        return math.inf, math.inf
    difference = float((before - after).abs().max())
    return difference, difference / max(float(before.abs().max()), 1e-30)


def _slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: geometric for a power of two, else extended by every other slope of the next power."""
    if num_heads & (num_heads - 1) == 0:
        ratio = 2.0 ** -(8.0 / num_heads)
        return [ratio ** (head + 1) for head in range(num_heads)]
    below = 1 << (num_heads.bit_length() - 1)
    return _slopes(below) + _slopes(2 * below)[::2][: num_heads - below]


def _rates(config: ModelConfig, layer: int) -> Tensor:
    """[H] decay rates s: a token's weight is multiplied by exp(-s) per step."""
    heads, layers = config.num_heads, config.num_layers
    if config.position in ("lrpe", "ape"):
        return torch.zeros(heads)
    if config.decay_slopes == "geometric":
        rate, temperature = torch.tensor(_slopes(heads)), 1 - layer / max(layers - 1, 1) + 1e-5
    else:
        rate, temperature = torch.arange(heads) * (8 / heads), 1 - layer / layers
    return rate * temperature if config.decay_temperature else rate


def _norm(config: ModelConfig, read: Read, name: str, x: Tensor) -> Tensor:
    if config.norm == "layernorm":
        return F.layer_norm(x, x.shape[-1:], read(f"{name}.weight").float(), None, config.norm_eps)
    x = x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return x * read(f"{name}.weight").float() if config.norm == "rmsnorm" else x


def _act(x: Tensor, kind: str) -> Tensor:
    return {"silu": F.silu, "relu": F.relu, "1+elu": lambda y: 1 + F.elu(y), "none": lambda y: y}[kind](x)


@torch.no_grad()
def reference_logits(config: ModelConfig, read: Read, progress: Progress) -> Tensor:
    """fp32 logits [P, T, V] of the fixed prompts by quadratic attention; one matrix is read at a time."""
    tokens = prompts(config.vocab_size)
    step = torch.arange(tokens.shape[1])
    gap = (step[:, None] - step[None, :]).float()
    x = _embed(config, read, tokens)
    for layer in range(config.num_layers):
        x = x + _mix(config, layer, _norm(config, read, f"layers.{layer}.token_norm", x), read, gap)
        y = _norm(config, read, f"layers.{layer}.channel_norm", x)
        l1, l2, l3 = (f"layers.{layer}.channel_mixer.l{part}.weight" for part in (1, 2, 3))
        y = _act(y @ read(l1).float().T, config.glu_activation) * (y @ read(l2).float().T)
        x = x + y @ read(l3).float().T
        progress("logits of the source", layer + 1, config.num_layers)
    return _head(config, read, _norm(config, read, "final_norm", x))


def _mix(config: ModelConfig, layer: int, y: Tensor, read: Read, gap: Tensor) -> Tensor:
    """Token mixer on normalized input [P, T, M]; gap [T, T] is t - s."""
    prefix = f"layers.{layer}.token_mixer"
    heads, head_dim, width = config.num_heads, config.head_dim, config.model_dim

    def project(z: Tensor, name: str) -> Tensor:
        return z @ read(f"{prefix}.{name}.weight").float().T

    if config.is_softmax(layer):
        return project(_softmax(config, prefix, project(y, "qkv_proj"), read, gap), "out_proj")
    gate = torch.ones(())
    if config.gate == "full":
        q, k, v, gate = project(y, "qkvu_proj").split(width, -1)
    else:
        q, k, v = project(y, "qkv_proj").split(width, -1)
    if config.gate == "low-rank":
        gate = torch.sigmoid(project(project(y, "output_gate.0"), "output_gate.1"))
    q, k, v = (z.unflatten(-1, (heads, head_dim)).transpose(1, 2) for z in (q, k, v))
    q, k, v = _act(q, config.activation), _act(k, config.activation), _act(v, config.value_activation)
    scores = q @ k.mT
    if config.uses_lrpe(layer):
        # LRPE rotates q by theta t and k by theta s, which multiplies each channel's product by cos(theta (t - s)).
        theta = read(f"{prefix}.lrpe.theta")[:, 0, None, None].double()
        scores = torch.einsum("bhtd,bhsd,htsd->bhts", q, k, torch.cos(theta * gap[:, :, None]).float())
    decay = torch.exp(-_rates(config, layer)[:, None, None] * gap.clamp(min=0)) * (gap >= 0)
    o = ((scores * decay) @ v).transpose(1, 2).flatten(-2)
    if config.norm_position == "attention":
        o = _norm(config, read, f"{prefix}.norm", o)
    o = o * gate
    if config.norm_position == "gate":
        o = _norm(config, read, f"{prefix}.norm", o)
    o = project(o, "out_proj")
    return _norm(config, read, f"{prefix}.norm", o) if config.norm_position == "output" else o


def _softmax(config: ModelConfig, prefix: str, qkv: Tensor, read: Read, gap: Tensor) -> Tensor:
    """Softmax attention [P, T, M] of projected q, k, v [P, T, 3M]; a position turns complex numbers of two channels."""
    q, k, v = (z.unflatten(-1, (config.num_heads, config.head_dim)).transpose(1, 2) for z in qkv.chunk(3, -1))
    if config.qk_norm:
        rms = lambda z: z / (z.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()  # noqa: E731
        q = rms(q) * read(f"{prefix}.query_norm.weight").float()
        k = rms(k) * read(f"{prefix}.key_norm.weight").float()
    speeds, scale = rotary(config, gap.device)
    turn = torch.polar(torch.tensor(scale), gap[:, :1] * speeds)
    q, k = (torch.complex(*z.chunk(2, -1)) * turn for z in (q, k))
    scores = (q @ k.mH).real / math.sqrt(config.head_dim)
    return (scores.masked_fill(gap < 0, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def _embed(config: ModelConfig, read: Read, tokens: Tensor) -> Tensor:
    x = read("embed_tokens.weight")[tokens].float()
    if config.scale_embedding:
        x = x * math.sqrt(config.model_dim)
    if config.position == "ape":
        x = x + read("embed_positions.weight")[: tokens.shape[1]].float()
    return x


def _head(config: ModelConfig, read: Read, x: Tensor) -> Tensor:
    weight = read("embed_tokens.weight" if config.tie_embeddings else HEAD)
    return torch.cat([x @ rows.float().T for rows in weight.split(_HEAD_ROWS)], dim=-1)


def _run_layers(
    config: ModelConfig,
    read: Read,
    block: Callable[[int], nn.Module],
    progress: Progress,
    run: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda block, x, positions: block(x, positions, None, None)[0],
    tokens: Tensor | None = None,
) -> Tensor:
    """Logits by embedding, blocks, final norm and head; each block is built, filled and dropped in turn."""
    tokens = prompts(config.vocab_size) if tokens is None else tokens
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    x = _embed(config, read, tokens)
    for layer in range(config.num_layers):
        with torch.device("meta"):
            module = block(layer)
        module = module.float().to_empty(device="cpu")
        for name, value in module.state_dict().items():
            value.copy_(read(f"layers.{layer}.{name}"))
        x = run(module, x, positions)
        progress("logits of the result", layer + 1, config.num_layers)
    norm = make_norm(config, config.model_dim)
    for name, value in norm.state_dict().items():
        value.copy_(read(f"final_norm.{name}"))
    return _head(config, read, norm(x))


@torch.no_grad()
def block_logits(config: ModelConfig, read: Read, progress: Progress, tokens: Tensor | None = None) -> Tensor:
    """Logits [P, T, V] of the fixed prompts, or of `tokens`, by this package's layers."""
    return _run_layers(config, read, lambda layer: Block(config, layer), progress, tokens=tokens)


@torch.no_grad()
def llama_logits(config: ModelConfig, read: Read, folder: Path, progress: Progress) -> Tensor:
    """Logits [P, T, V] of the fixed prompts by transformers' own layers; `read` takes the names in its files."""
    quiet_import()
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder)
    hf_config._attn_implementation = "sdpa"
    family = hf_config.model_type
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(code, f"{family.capitalize()}RotaryEmbedding")(config=hf_config)
    own = {"final_norm.weight": "model.norm.weight", HEAD: HEAD}

    def run(block: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        x = block(x, attention_mask=None, position_ids=positions, position_embeddings=rotary(x, positions))
        return x[0] if isinstance(x, tuple) else x

    layer = getattr(code, f"{family.capitalize()}DecoderLayer")
    renamed = lambda name: read(own.get(name, f"model.{name}"))  # noqa: E731
    return _run_layers(config, renamed, lambda index: layer(hf_config, index), progress, run)


@torch.no_grad()
def exported_logits(config: ModelConfig, read: Read, folder: Path, progress: Progress) -> Tensor:
    """Logits [P, T, V] of the fixed prompts by the code in a Hugging Face folder. Needs transformers."""
    quiet_import()
    with hf_folder.imported_code(folder) as code:
        hf_config = code.TnllmConfig(**to_hf_config(config))
        return _run_layers(config, read, lambda layer: code.TnllmBlock(hf_config, layer), progress)
