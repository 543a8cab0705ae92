"""Weight files read one tensor at a time: safetensors, PyTorch `.bin` shards, training checkpoints.

    tensors = open_tensors(folder)
    tensors.infos["model.embed_tokens.weight"]       # shape, dtype and file, without reading the data
    value = tensors.read("model.embed_tokens.weight")

Files are opened for each read and closed after it, because touched pages of a mapped file count as resident memory. A
`.bin` file is a pickle. It is read with `weights_only=True`, so no code in it runs, and refused if it holds anything but
tensors.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tnllm.convert.checksums import reading
from tnllm.errors import RunError, UserError
from tnllm.modeling.weights import CHECKPOINT, INDEX, SINGLE, tensor_files

BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
DTYPE_NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# A mapped `.bin` file is mapped again after this many bytes, to drop its touched pages.
_REMAP_BYTES = 2**29


@dataclass(frozen=True)
class Info:
    """Description of a tensor that was not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class Tensors:
    """Named tensors on disk. `files` are all their files; `form` names the file format, for people."""

    form: str
    files: list[Path]
    infos: dict[str, Info]
    read: Callable[[str], Tensor]


def open_tensors(folder: Path, allow_int8: bool = False) -> Tensors:
    """Open the weights of a folder; safetensors win over `.bin` files if both are there.

    Raises UserError if there are no weights, an index points out of the folder or a pickle holds more than tensors,
    RunError for damaged files.
    """
    if (folder / CHECKPOINT).is_dir():
        return _open_checkpoint(folder / CHECKPOINT)
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return _open_safetensors(folder, allow_int8)
    if (folder / BIN_INDEX).is_file() or (folder / BIN_SINGLE).is_file():
        return _open_bins(folder)
    raise UserError(f"{folder} holds no weights; looked for {INDEX}, {SINGLE}, {BIN_INDEX}, {BIN_SINGLE}")


def _check_index(folder: Path, index: str, infos: dict[str, Info]) -> None:
    """Raise UserError if the index, where there is one, and the files disagree."""
    if not (folder / index).is_file():
        return
    with reading(folder / index):
        listed: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    for name, file in listed.items():
        if name not in infos or infos[name].file.name != file:
            raise UserError(f"{folder / index} says that {name} is in {file}, and it is not; copy the folder again")
    extra = sorted(set(infos) - set(listed))
    if extra:
        raise UserError(f"{infos[extra[0]].file} holds {extra[0]}, which {index} does not list; copy the folder again")


def _merge(infos: dict[str, Info], more: dict[str, Info]) -> None:
    for name in infos.keys() & more.keys():
        raise UserError(f"{name} is in {infos[name].file.name} and in {more[name].file.name}; keep one of the files")
    infos.update(more)


def _open_safetensors(folder: Path, allow_int8: bool) -> Tensors:
    files = tensor_files(folder)
    infos: dict[str, Info] = {}
    for file in files:
        _merge(infos, safetensors_infos(file, allow_int8))
    _check_index(folder, INDEX, infos)

    def read(name: str) -> Tensor:
        with _opened(infos[name].file) as tensors:
            # In memory of its own.
            return tensors.get_tensor(name).clone()

    return Tensors(f"safetensors, {_count(files)}", files, infos, read)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises RunError, which names it, if it cannot be read or is damaged."""
    try:
        with reading(file), safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}); copy it again") from None


def _count(files: list[Path]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def safetensors_infos(file: Path, allow_int8: bool = False) -> dict[str, Info]:
    """Read names, shapes and dtypes from a file's header. Raises RunError for a damaged file."""
    infos = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            part = tensors.get_slice(name)
            infos[name] = Info(tuple(part.get_shape()), _dtype(part.get_dtype(), name, file, allow_int8), file)
    return infos


def _dtype(name: str, tensor: str, file: Path, allow_int8: bool) -> torch.dtype:
    if allow_int8 and name == "I8":
        return torch.int8
    if name not in DTYPE_NAMES:
        raise UserError(
            f"{file}: {tensor} is {name}, a quantized or unknown type; convert the weights that it was made from"
        )
    return DTYPE_NAMES[name]


def _open_bins(folder: Path) -> Tensors:
    files = tensor_files(folder, BIN_INDEX, BIN_SINGLE)
    infos: dict[str, Info] = {}
    for file in files:
        file_infos = {name: Info(tuple(value.shape), value.dtype, file) for name, value in _load_bin(file).items()}
        for name, info in file_infos.items():
            if info.dtype not in DTYPE_NAMES.values():
                raise UserError(f"{file}: {name} is {info.dtype}; convert the weights that it was made from")
        _merge(infos, file_infos)
    _check_index(folder, BIN_INDEX, infos)
    # Touched pages stay resident, so only one file is mapped at a time, and mapped again now and then.
    mapped: dict[Path, dict[str, Tensor]] = {}
    touched = 0

    def read(name: str) -> Tensor:
        nonlocal touched
        file = infos[name].file
        if file not in mapped or touched > _REMAP_BYTES:
            mapped.clear()
            mapped[file], touched = _load_bin(file), 0
        value = mapped[file][name].detach().clone(memory_format=torch.contiguous_format)
        touched += value.nbytes
        return value

    return Tensors(f"PyTorch pickle, {_count(files)}", files, infos, read)


def _load_bin(file: Path) -> dict[str, Tensor]:
    """Load the tensors of one `.bin` file, mapped if its format allows it."""
    try:
        with reading(file):
            is_zip = zipfile.is_zipfile(file)
            values: Any = torch.load(file, map_location="cpu", mmap=True if is_zip else None, weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {match[1]}" if match else "cannot be read as tensors"
        raise UserError(
            f"{file} {what}: it holds more than tensors or is damaged. No code in it was run; "
            "download it again from a source you trust, or as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{file} is damaged ({reason}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not tensors by name; it is not a weights checkpoint")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UserError(f"{file}: {name!r} is a {type(value).__name__}; a weights checkpoint holds only tensors")
    return values


def _open_checkpoint(folder: Path) -> Tensors:
    """Open a training checkpoint; `read` assembles a tensor from the parts of all ranks."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = "; .distcp files hold pickles and are not read" if any(folder.glob("*.distcp")) else ""
        raise UserError(f"{folder} holds no safetensors{other}; give a step folder written by tnllm train")
    for file in files:
        safetensors_infos(file)
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    storage: dict[MetadataIndex, Any] = metadata.storage_data
    infos: dict[str, Info] = {}
    parts: dict[str, list[tuple[Path, tuple[slice, ...]]]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        parts[name] = []
        for chunk in entry.chunks:
            file = Path(storage[MetadataIndex(name, chunk.offsets)].relative_path)
            index = tuple(slice(a, a + size) for a, size in zip(chunk.offsets, chunk.sizes, strict=True))
            parts[name].append((file, index))
        infos[name] = Info(tuple(entry.size), entry.properties.dtype, parts[name][0][0])
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise RunError(f"{folder}: parts of {name} are missing; the files of all ranks must be in one folder")

    def read(name: str) -> Tensor:
        value = torch.empty(infos[name].shape, dtype=infos[name].dtype)
        for file, index in parts[name]:
            with _opened(file) as tensors:
                value[index] = tensors.get_tensor(name)
        return value

    return Tensors(f"training checkpoint, {_count(files)}", files, infos, read)
