"""Published weights: a folder of config.json, generation_config.json, tokenizer.model and safetensors.

    save_model(model, "weights", tokenizer=Path("tokenizer.model"))
    model = load_model("weights", device="cpu", dtype=torch.float32)

A Hugging Face folder that `tnllm convert --to hf` wrote loads the same way. `resolve_model` finds the weights folder for a
run folder, a step folder or None. Nothing here is ever unpickled.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnllm import __version__, assets, hub
from tnllm.errors import RunError, UserError
from tnllm.files import read_json, written_folder
from tnllm.modeling.config import LoraConfig, ModelConfig, make_config
from tnllm.modeling.hf_names import HEAD, from_hf_config, from_official
from tnllm.modeling.int8 import Int8Linear
from tnllm.modeling.lora import add_lora, merge_lora
from tnllm.modeling.model import LanguageModel, build_model

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER = "tokenizer.model"
CHECKPOINT = "model"  # the folder of tensors in a training checkpoint
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
GENERATION_DEFAULTS: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "repetition_penalty": 1.03,
}


def config_json(config: ModelConfig, dtype: torch.dtype, lora: LoraConfig | None = None) -> str:
    """The text of a weights folder's config.json; `lora` if the folder's tensors include an adapter."""
    values: dict[str, Any] = {
        "model_type": "tnllm",
        "tnllm_version": __version__,
        "dtype": str(dtype).removeprefix("torch."),
        "model": config.model_dump(exclude=config.unset),
    }
    if lora is not None:
        values["lora"] = lora.model_dump()
    return json.dumps(values, indent=2) + "\n"


def save_model(
    model: LanguageModel,
    folder: Path | str,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    generation: dict[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a weights folder: first a temporary one, which is then renamed.

    `dtype` casts the weights (LRPE's theta stays fp32). Files above `shard_bytes` are split and get an index.
    Raises OSError when the disk is full; an older folder is then untouched.
    """
    stored = dtype or (torch.int8 if model.is_int8 else model.dtype)
    settings = {**GENERATION_DEFAULTS, **(generation or {})}
    with written_folder(Path(folder)) as temporary:
        (temporary / CONFIG).write_text(config_json(model.config, stored), encoding="utf-8")
        (temporary / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        tensors = {
            name: (tensor if name.endswith("lrpe.theta") or stored == torch.int8 else tensor.to(stored))
            .cpu()
            .contiguous()
            for name, tensor in model.state_dict().items()
        }
        shards = split_shards({name: tensor.nbytes for name, tensor in tensors.items()}, shard_bytes)
        for file, names in shards.items():
            save_file({name: tensors[name] for name in names}, temporary / file, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            (temporary / INDEX).write_text(index_json(shards, total), encoding="utf-8")


def split_shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name → names of tensors, in the given order; a tensor larger than `shard_bytes` gets its own file."""
    shards: list[list[str]] = [[]]
    left = shard_bytes
    for name, size in sizes.items():
        if size > left and shards[-1]:
            shards.append([])
            left = shard_bytes
        shards[-1].append(name)
        left -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def index_json(shards: Mapping[str, Sequence[str]], num_bytes: int) -> str:
    """The text of the index beside several files."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def read_config(folder: Path) -> tuple[ModelConfig, torch.dtype]:
    """Model config and stored dtype of a weights folder, or of a Hugging Face folder that `tnllm convert` wrote."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}; give a weights folder or a run folder")
    advice = "convert other formats with `tnllm convert`"
    values = read_json(path, advice)
    if values.get("model_type") == "tnllm" and "model" not in values and "auto_map" in values:
        model: Any = from_hf_config(values)
        dtype = values.get("dtype", values.get("torch_dtype"))
    else:
        model, dtype = values.get("model"), values.get("dtype")
    if not isinstance(model, dict):
        raise UserError(f"{path} is not a tnllm config; {advice}")
    if "quantization_config" in values:
        raise UserError(f"{folder} is quantized; load it with transformers, or convert the weights it was made from")
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    return make_config(model), DTYPES[dtype]


def read_lora(folder: Path) -> LoraConfig | None:
    """Config of the adapter in a training checkpoint; None if it has none."""
    values = read_json(folder / CONFIG).get("lora")
    return None if values is None else LoraConfig(**values)


def load_model(
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> LanguageModel:
    """Load a weights folder or run folder (None: the model that ships in the package), ready for inference.

    `dtype` None keeps the stored one. For torch.int8 (`tnllm.modeling.int8`) matrices are rounded as they are read;
    those that a folder holds in int8 are widened for another. An adapter in a training checkpoint is merged, or with
    `merge` False stays attached. Raises UserError for a folder that is not a model, RunError for damaged files.
    """
    folder = resolve_model(folder)
    config, stored = read_config(folder)
    wanted = dtype or stored
    lora = read_lora(folder)
    int8 = stored == torch.int8 or (wanted == torch.int8 and lora is None)
    model = build_model(config, "meta", torch.float32 if torch.int8 in (stored, wanted) else wanted)
    if lora is not None:
        add_lora(model, lora)
    if int8:
        model.quantize_int8()
    model = model.to_empty(device=device)
    target: dict[str, Any] = model.state_dict()
    if int8:
        target |= {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    if (folder / CHECKPOINT).is_dir():
        try:
            _load_files(target, sorted((folder / CHECKPOINT).glob("*.safetensors")), folder / CHECKPOINT)
        except RunError as error:
            raise RunError(
                f"{error}; {folder} is damaged or not a checkpoint of this model: take another step"
            ) from None
    else:
        _load_files(target, tensor_files(folder), folder)
    if lora is not None and merge:
        merge_lora(model)
    if wanted == torch.int8:
        if not int8:
            model.quantize_int8()
    elif int8:
        model.dequantize()
        model = model.to(wanted)
    return model.eval().requires_grad_(False)


def _load_files(target: dict[str, Any], files: Sequence[Path], folder: Path) -> None:
    missing = set(target)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    # Hugging Face folders prefix our names with `model.`, and may list a tied head.
                    name = from_official(key)
                    if name == HEAD and HEAD not in target:
                        continue
                    _copy(target, name, tensors.get_tensor(key), file)
                    missing.discard(name)
                    if isinstance(target[name], Int8Linear) and tensors.get_slice(key).get_dtype() != "I8":
                        missing.discard(f"{name.removesuffix('weight')}scale")
        except SafetensorError as error:
            raise RunError(f"{file} is damaged ({error}); copy or convert it again") from None
    if missing:
        raise RunError(f"{folder} lacks {len(missing)} tensors, first {sorted(missing)[0]!r}; it is incomplete")


def _copy(target: dict[str, Any], name: str, value: Tensor, file: Path) -> None:
    if name not in target:
        raise RunError(f"{file} holds {name!r}, which this model does not have; config.json and weights differ")
    if value.shape != target[name].shape:
        raise RunError(f"{file}: {name} is {list(value.shape)}, config.json says {list(target[name].shape)}")
    target[name].copy_(value)


def tensor_files(folder: Path, index: str = INDEX, single: str = SINGLE) -> list[Path]:
    """The safetensors files of a folder: those named by its index, or the single one. Raises UserError."""
    if (folder / index).is_file():
        try:
            weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / index} is not an index (JSON with a weight_map); copy it again") from None
        # A name that is a path could point anywhere.
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name or "\\" in name]
        if bad:
            raise UserError(f"{folder / index} names {bad[0]!r}; shards must lie in the same folder")
        files = [folder / name for name in names]
    else:
        files = [folder / single]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; the weights folder is incomplete")
    return files


def latest_step(run: Path) -> str | None:
    """The name of a step folder in `run`/latest; None if the file is missing or damaged."""
    try:
        name = (run / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if re.fullmatch("step-[0-9]+", name) else None


def resolve_model(model: Path | str | None) -> Path:
    """The folder to load for a weights, run or step folder or a hub name; None: the model that ships in the package.

    A run folder resolves to its published weights, or while it is training to its latest checkpoint.
    """
    if model is None:
        return assets.demo_weights()
    folder = hub.local(model)
    if not folder.is_dir():
        raise UserError(f"model {str(model)!r} is not a folder; give a run folder, a weights folder or hf://ORG/NAME")
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "weights" / CONFIG).is_file():
        return folder / "weights"
    steps = [name] if (name := latest_step(folder)) else sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    for step in (folder / "checkpoints" / name for name in reversed(steps)):
        if (step / CONFIG).is_file() and ".tmp-" not in step.name:
            return step
    raise UserError(f"{folder} holds neither {CONFIG} nor weights/{CONFIG}; give a run folder or a weights folder")


def trained_length(folder: Path) -> int | None:
    """Return the sequence length of training, from the run's config beside the weights; None if there is no config."""
    # Imported here, so that loading a model does not pay for it.
    import yaml

    for parent in (folder, *folder.parents[:2]):
        path = parent / "config.resolved.yaml"
        if path.is_file():
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            length = (values.get("data") or {}).get("seq_len")
            return length if isinstance(length, int) else None
    return None
