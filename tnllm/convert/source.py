"""The folder to convert, of any kind, as tensors under tnllm's parameter names.

    source = open_source(Path("TransNormerLLM-385M"))
    source.check()                         # raises UserError for missing, unexpected and misshapen keys
    source.read("layers.0.token_mixer.qkvu_proj.weight")

Kinds: `official` (released checkpoints), `hf` (written by `--to hf`, or saved by transformers from such a folder), `tnllm`
(weights folders) and `checkpoint` (step folders of a run).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnllm.convert.official import MODEL_TYPE, from_official_config
from tnllm.convert.tensors import Tensors, open_tensors
from tnllm.errors import RunError, UserError
from tnllm.files import read_json
from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.modeling.hf_names import HEAD, IGNORED, to_official
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import CHECKPOINT, CONFIG, GENERATION, read_config, read_lora, resolve_model

# An error message lists at most this many keys.
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A folder to convert. `keys` maps tnllm's parameter names to those in its files; `read` takes a tnllm name."""

    kind: str
    folder: Path
    config: ModelConfig
    tensors: Tensors
    expected: dict[str, tuple[int, ...]]
    keys: dict[str, str]
    dtype: torch.dtype  # of the matrices; LRPE's theta may be wider
    generation: dict[str, Any]  # generation_config.json
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()
    merged: frozenset[str] = frozenset()  # names whose `read` adds an adapter's product and gives fp32
    adapter_keys: frozenset[str] = frozenset()  # keys of an adapter among the files' own

    @property
    def version(self) -> str:
        """v1, v2 or v3 for a TransNormerLLM, else the kind of model."""
        return self.config.version if self.config.kind == "transnormer" else self.config.kind

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(torch.Size(shape).numel() for shape in self.expected.values())

    @property
    def head_key(self) -> str | None:
        """Key of a tied head that the files store beside the embedding; None if they do not."""
        return HEAD if HEAD not in self.expected and HEAD in self.tensors.infos else None

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that `read` gives, LRPE's theta aside."""
        infos = self.tensors.infos
        return {
            torch.float32 if name in self.merged else infos[key].dtype
            for name, key in self.keys.items()
            if key in infos and not name.endswith("lrpe.theta")
        }

    def missing(self) -> list[str]:
        """Keys that the config needs and the files lack."""
        return [key for key in self.keys.values() if key not in self.tensors.infos]

    def unexpected(self) -> list[str]:
        """Keys in the files that the model does not have."""
        known = {*self.keys.values(), *self.adapter_keys, *IGNORED, *([self.head_key] if self.head_key else [])}
        return [key for key in self.tensors.infos if key not in known]

    def misshapen(self) -> list[str]:
        """Keys whose shape differs from the config's, as text."""
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
        """Raise one UserError that lists all missing, unexpected and misshapen keys."""
        problems = []
        keys_by_problem = {
            "missing": self.missing(),
            "unexpected": self.unexpected(),
            "of wrong shape": self.misshapen(),
        }
        for what, keys in keys_by_problem.items():
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                problems.append(f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{more}")
        if problems:
            raise UserError(
                f"{self.folder} does not hold the {self.version} model that its {CONFIG} describes: "
                f"{'; '.join(problems)} (--dry-run lists every key)"
            )

    def check_tied_head(self) -> None:
        """Raise UserError if a head stored beside a tied embedding differs from it. Reads both."""
        if self.head_key is None:
            return
        embedding, head = self.read("embed_tokens.weight"), self.tensors.read(self.head_key)
        if not torch.equal(embedding, head):
            raise UserError(
                f"{self.folder}: {HEAD} differs from the embedding, and {CONFIG} ties them; if the head was trained apart, "
                'write "tie_word_embeddings": false into that file'
            )


def open_source(path: Path) -> Source:
    """Detect the kind of folder at `path` and read everything but the tensors.

    Raises UserError for a folder that is not a model or an unknown version, RunError for damaged files.
    """
    folder = path if not path.is_dir() or (path / CONFIG).is_file() else resolve_model(path)
    if not folder.is_dir():
        raise UserError(
            f"{path} is not a folder; give a folder with {CONFIG} and weights, a run folder or a step folder"
        )
    values = read_json(folder / CONFIG, "copy it again")
    kind = values.get("model_type")
    if kind == MODEL_TYPE:
        return _build("official", folder, from_official_config(values, folder / CONFIG), to_official)
    if "tnllm_version" in values and kind != "tnllm":
        raise UserError(
            f"{folder} is a softmax baseline in transformers' layout, from which there is no way back; convert the run or "
            "the weights that it was made from"
        )
    if kind != "tnllm":
        raise UserError(
            f"{folder / CONFIG}: model_type is {kind!r}; convert reads {MODEL_TYPE!r} (released checkpoints) and 'tnllm'"
        )
    config, _ = read_config(folder)
    if (folder / CHECKPOINT).is_dir():
        return _merge_lora(_build("checkpoint", folder, config, lambda name: name), read_lora(folder))
    if "model" in values:
        return _build("tnllm", folder, config, lambda name: name)
    return _build("hf", folder, config, to_official)


def _merge_lora(source: Source, lora: LoraConfig | None) -> Source:
    """A checkpoint with an adapter's tensors beside the frozen weights."""
    if lora is None:
        return source
    parts = {name: [f"{name.removesuffix('weight')}lora_{part}.weight" for part in "AB"] for name in source.expected}
    pairs = {name: keys for name, keys in parts.items() if all(key in source.tensors.infos for key in keys)}

    def product(name: str) -> Tensor:
        a, b = (source.tensors.read(key).float() for key in pairs[name])
        return lora.alpha / lora.rank * (b @ a)

    source = with_products(source, pairs, product, "the checkpoint")
    return replace(source, adapter_keys=frozenset(key for pair in pairs.values() for key in pair))


def with_products(source: Source, names: Iterable[str], product: Callable[[str], Tensor], origin: str) -> Source:
    """The source whose `read` adds scale * B A of an adapter, `product(name)`, to the weights of these names, in fp32."""
    merged = frozenset(names)

    def read(name: str) -> Tensor:
        return source.read(name).float() + product(name) if name in merged else source.read(name)

    return replace(
        source, read=read, merged=merged, notes=(*source.notes, f"merged {len(merged)} LoRA pairs of {origin}")
    )


def _build(kind: str, folder: Path, config: ModelConfig, to_key: Callable[[str], str]) -> Source:
    tensors = open_tensors(folder)
    expected = {name: tuple(value.shape) for name, value in build_model(config, "meta").state_dict().items()}
    keys = {name: to_key(name) for name in expected}

    def read(name: str) -> Tensor:
        value = tensors.read(keys[name])
        if not torch.isfinite(value).all():
            raise RunError(f"{tensors.infos[keys[name]].file}: {keys[name]} holds NaN or infinity; the file is damaged")
        return value

    dtypes = [tensors.infos[key].dtype for name, key in keys.items() if key in tensors.infos and "lrpe" not in name]
    # The widest dtype, so that nothing is lost where a folder mixes several.
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    dtype = torch.float32 if dtype == torch.float64 or (dtype.itemsize == 2 and len(set(dtypes)) > 1) else dtype
    path = folder / GENERATION
    generation = read_json(path) if path.is_file() else {}
    return Source(kind, folder, config, tensors, expected, keys, dtype, generation, read)
