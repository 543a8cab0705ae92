"""What is converted: any folder a person names, seen as tensors under our parameter names.

    source = open_source(Path("TransNormerLLM-385M"), Layout())
    source.problems()                      # missing, unexpected and misshapen keys; empty when the folder is whole
    source.read("layers.0.token_mixer.qkvu_proj.weight")

Kinds: `official` (released checkpoints), `hf` (what `--to hf` wrote, or transformers saved from it), `tnllm` (weights
folders) and `checkpoint` (step folders of a run).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm.convert.official import MODEL_TYPE, Layout, from_official_config, official_name, permutes, to_split
from tnllm.convert.tensors import Info, Tensors, open_tensors
from tnllm.errors import RunError, UserError
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.hf_names import HEAD, IGNORED, to_official
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import CHECKPOINT, CONFIG, GENERATION, read_config, resolve_model

# Keys shown of a longer list.
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A folder to convert. `keys` maps our names to those in its files; `read` takes one of our names."""

    kind: str
    folder: Path
    config: ModelConfig
    tensors: Tensors
    expected: dict[str, tuple[int, ...]]
    keys: dict[str, str]
    dtype: torch.dtype  # of the matrices; LRPE's theta may be wider
    settings: dict[str, Any]  # generation_config.json
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """v1, v2 or v3 for the released layout, else the kind of model."""
        return self.config.version if self.config.kind == "transnormer" else self.config.kind

    @property
    def num_parameters(self) -> int:
        """Tied ones counted once."""
        return sum(torch.Size(shape).numel() for shape in self.expected.values())

    @property
    def head_key(self) -> str | None:
        """The key of a tied head that the files list beside the embedding."""
        return HEAD if HEAD not in self.expected and HEAD in self.tensors.infos else None

    def info(self, name: str) -> Info:
        """Of one of our names."""
        return self.tensors.infos[self.keys[name]]

    def missing(self) -> list[str]:
        """Keys the config asks for and the files lack."""
        return [key for key in self.keys.values() if key not in self.tensors.infos]

    def unexpected(self) -> list[str]:
        """Keys in the files that this model does not have."""
        known = {*self.keys.values(), *IGNORED, *([self.head_key] if self.head_key else [])}
        return [key for key in self.tensors.infos if key not in known]

    def misshapen(self) -> list[str]:
        """Keys whose shape is not what the config says."""
        shapes = {self.keys[name]: shape for name, shape in self.expected.items()}
        if self.head_key:
            shapes[self.head_key] = self.expected["embed_tokens.weight"]
        infos = self.tensors.infos
        return [
            f"{key} is {list(infos[key].shape)}, {CONFIG} says {list(shape)}"
            for key, shape in shapes.items()
            if key in infos and infos[key].shape != shape
        ]

    def check(self) -> None:
        """Raise one UserError that sums up what does not fit."""
        found = []
        for what, keys in (
            ("missing", self.missing()),
            ("unexpected", self.unexpected()),
            ("of wrong shape", self.misshapen()),
        ):
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                found.append(f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{more}")
        if found:
            hint = (
                "; v3's key names can be given with --set" if self.version == "v3" and self.kind == "official" else ""
            )
            raise UserError(
                f"{self.folder} does not hold the {self.version} model its {CONFIG} describes: {'; '.join(found)}{hint} "
                "(--dry-run lists every key)"
            )

    def check_tied_head(self) -> None:
        """A head that is listed beside a tied embedding must be the embedding. Reads both."""
        if self.head_key is None:
            return
        embedding, head = self.read("embed_tokens.weight"), self.tensors.read(self.head_key)
        if not torch.equal(embedding, head):
            raise UserError(
                f"{self.folder}: {HEAD} differs from the embedding, and {CONFIG} ties them; if the head was trained apart, "
                'write "tie_word_embeddings": false into that file'
            )


def open_source(named: Path, layout: Layout) -> Source:
    """Find out what `named` is and read everything but the data.

    Raises UserError for what is no model folder or an unknown version, RunError for damaged files.
    """
    folder = named if not named.is_dir() or _config_values(named) is not None else resolve_model(named)
    if not folder.is_dir():
        raise UserError(f"{named} is no folder; give a folder with {CONFIG} and weights, a run folder or a step folder")
    values = _config_values(folder) or {}
    kind = values.get("model_type")
    if kind == MODEL_TYPE:
        config = from_official_config(values, folder / CONFIG, layout)
        return _build("official", folder, config, layout, lambda name: official_name(name, layout))
    if kind != "tnllm":
        raise UserError(
            f"{folder / CONFIG}: model_type is {kind!r}; convert reads {MODEL_TYPE!r} (released checkpoints) and 'tnllm'"
        )
    config, _ = read_config(folder)
    if (folder / CHECKPOINT).is_dir():
        return _build("checkpoint", folder, config, layout, lambda name: name)
    if "model" in values:
        return _build("tnllm", folder, config, layout, lambda name: name)
    return _build("hf", folder, config, layout, to_official)


def _build(kind: str, folder: Path, config: ModelConfig, layout: Layout, key: Callable[[str], str]) -> Source:
    tensors = open_tensors(folder)
    expected = {name: tuple(value.shape) for name, value in build_model(config, "meta").state_dict().items()}
    keys = {name: key(name) for name in expected}

    def read(name: str) -> Tensor:
        value = tensors.read(keys[name])
        if kind == "official" and permutes(name, layout):
            value = to_split(value, config.num_heads)
        if not torch.isfinite(value).all():
            raise RunError(f"{tensors.infos[keys[name]].file}: {keys[name]} holds NaN or infinity; the file is damaged")
        return value

    found = [tensors.infos[key].dtype for name, key in keys.items() if key in tensors.infos and "lrpe" not in name]
    # The widest, so that nothing is lost where a folder mixes types.
    dtype = max(found, key=lambda dtype: dtype.itemsize, default=torch.float32)
    dtype = torch.float32 if dtype == torch.float64 or (dtype.itemsize == 2 and len(set(found)) > 1) else dtype
    return Source(kind, folder, config, tensors, expected, keys, dtype, read_json(folder / GENERATION), read)


def _config_values(folder: Path) -> dict[str, Any] | None:
    if not (folder / CONFIG).is_file():
        return None
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is no file. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values
