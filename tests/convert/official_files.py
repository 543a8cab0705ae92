"""Random checkpoints in the released layouts, written from the published key table and config keys, sharing no code."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SMALL = {"decoder_embed_dim": 32, "hidden_dim": 32, "decoder_layers": 3, "decoder_attention_heads": 2, "glu_dim": 48}
# What the config.json of each version says, beside its sizes.
VERSIONS = {
    "v1": {"vocab_size": 97, "no_scale_embedding": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "v2": {"vocab_size": 97, "no_scale_embedding": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "v3": {
        "vocab_size": 100280,
        "no_scale_embedding": False,
        "gate_dim": 16,
        "linear_use_lrpe": 0,
        "pad_token_id": 100262,
        "bos_token_id": 100261,
        "eos_token_id": 100257,
    },
}


def config(version: str, **changes) -> dict:
    """A config.json as released."""
    return {
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transnormer.TransnormerConfig",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
        "model_type": "transnormer",
        **SMALL,
        **VERSIONS[version],
        "linear_act_fun": "swish",
        "linear_use_lrpe_list": [1, 0, 0],
        "norm_type": "simplermsnorm",
        "bias": False,
        "init_std": 0.02,
        "add_bos_token": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.32.0",
        **changes,
    }


def keys(version: str, values: dict) -> dict[str, tuple[int, ...]]:
    """Key → shape."""
    width, heads, glu = values["decoder_embed_dim"], values["decoder_attention_heads"], values["glu_dim"]
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (values["vocab_size"], width)}
    for layer in range(values["decoder_layers"]):
        mixer = f"model.layers.{layer}.token_mixer"
        if layer == 0:
            table[f"{mixer}.lrpe.theta"] = (heads, 1, width // heads)
        if version == "v3":
            table[f"{mixer}.qkv_proj.weight"] = (3 * width, width)
            table[f"{mixer}.output_gate.0.weight"] = (16, width)
            table[f"{mixer}.output_gate.1.weight"] = (width, 16)
        else:
            table[f"{mixer}.qkvu_proj.weight"] = (4 * width, width)
        table[f"{mixer}.out_proj.weight"] = (width, width)
        for part, shape in (("l1", (glu, width)), ("l2", (glu, width)), ("l3", (width, glu))):
            table[f"model.layers.{layer}.channel_mixer.{part}.weight"] = shape
    table["lm_head.weight"] = (values["vocab_size"], width)
    return table


def random_tensors(version: str, values: dict, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict:
    """Random weights, the head tied; large enough that every part of the model matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in keys(version, values).items():
        if key == "lm_head.weight":
            tensors[key] = tensors["model.embed_tokens.weight"]
        elif key.endswith("theta"):
            tensors[key] = (0.5 * torch.rand(shape, generator=generator)).to(dtype)
        else:
            tensors[key] = (0.2 * torch.randn(shape, generator=generator)).to(dtype)
    return tensors


def write(folder: Path, version: str, form: str = "bin", dtype: torch.dtype = torch.bfloat16, **changes) -> dict:
    """Write a checkpoint: form is bin, bins (sharded), safetensors or shards. Returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config(version, torch_dtype=str(dtype).removeprefix("torch."), **changes)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = random_tensors(version, values, dtype)
    write_tensors(folder, tensors, form)
    if version == "v3":
        write_tiktoken(folder / "transnormer_100k.tiktoken")
    return tensors


def write_tensors(folder: Path, tensors: dict, form: str) -> None:
    names = list(tensors)
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "safetensors":
        # A released file of a tied model holds one copy.
        save_file({key: tensors[key] for key in names[:-1]}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        suffix, prefix = ("bin", "pytorch_model") if form == "bins" else ("safetensors", "model")
        cuts, weight_map = [names[:5], names[5:-3], names[-3:]], {}
        for number, part in enumerate(cuts, start=1):
            file = f"{prefix}-{number:05d}-of-00003.{suffix}"
            shard = {key: tensors[key].clone() for key in part}
            if suffix == "bin":
                torch.save(shard, folder / file)
            else:
                save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{prefix}.{suffix}.index.json").write_text(json.dumps(index))


def write_tiktoken(path: Path) -> None:
    """All bytes, and some merges of two tokens before them, in the file format of the release."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in ("Once", " upon", " time", " the", "ing", "中国", "é", "  ", "1", "12"):
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
