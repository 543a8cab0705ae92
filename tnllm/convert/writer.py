"""Safetensors shards written tensor by tensor, so that memory is one tensor, not one shard.

    sums = write_shards(folder, outputs, shard_bytes, metadata, progress)     # file name → SHA-256

The safetensors library writes only shards that are complete in memory. The format is short: eight bytes of header length,
a JSON header with dtype, shape and offsets of each tensor, then the data. All reading goes through the library.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tnllm.convert.checksums import Progress
from tnllm.convert.tensors import DTYPE_NAMES
from tnllm.modeling.weights import INDEX, index_json, split_shards

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()} | {torch.int8: "I8"}


@dataclass(frozen=True)
class Output:
    """One tensor of the result; `make` reads and converts it when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    folder: Path, outputs: list[Output], shard_bytes: int, metadata: dict[str, str], progress: Progress
) -> dict[str, str]:
    """Write all tensors, and an index if there are several files. Returns the SHA-256 of each file."""
    by_name = {output.name: output for output in outputs}
    shards = split_shards({output.name: output.num_bytes for output in outputs}, shard_bytes)
    total = sum(output.num_bytes for output in outputs)
    done = 0
    sums = {}
    for file, names in shards.items():
        shard = [by_name[name] for name in names]
        digest = hashlib.sha256()
        # Wide dtypes first, so that every tensor is aligned to its item size. The parts of an int8 matrix, which are made
        # together, keep their order: sorted apart, the rest of every matrix would stay in memory until its turn.
        has_int8 = any(output.dtype == torch.int8 for output in shard)
        ordered = shard if has_int8 else sorted(shard, key=lambda output: -output.dtype.itemsize)
        with open(folder / file, "wb") as handle:
            header = _header(ordered, metadata)
            handle.write(header)
            digest.update(header)
            for output in ordered:
                data = _bytes(output)
                handle.write(data)
                digest.update(data)
                done += output.num_bytes
                progress(f"writing {file}", done, total)
        sums[file] = digest.hexdigest()
    if len(shards) > 1:
        index = index_json(shards, total)
        (folder / INDEX).write_text(index, encoding="utf-8")
        sums[INDEX] = hashlib.sha256(index.encode()).hexdigest()
    return sums


def _header(outputs: list[Output], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for output in outputs:
        end = start + output.num_bytes
        entries[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(output: Output) -> memoryview:
    value = output.make()
    assert tuple(value.shape) == output.shape and value.dtype == output.dtype, output.name
    return value.contiguous().view(-1).view(torch.uint8).numpy().data
