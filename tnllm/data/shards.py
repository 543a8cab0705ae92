"""Token shards: the folder that `tnllm data tokenize` writes and training reads.

stream = TokenStream.open("corpus-tokens", split="train")
stream.read(start=0, count=2049)         # int64 ids; the stream is circular
stream.document(7)                       # the ids of one document

The folder holds

    manifest.json      counts, hashes, options and inputs (`Manifest`); written last, atomically
    train-00000.bin    token ids, little endian, uint16 where the vocabulary fits, else uint32
    train-00000.idx    uint64 little endian, documents + 1 values: where each document starts, then the end
    val-00000.bin/.idx the held-out documents
    token_bytes.bin    uint16 little endian, V values: UTF-8 bytes that each token stands for
    tokenizer.model    the tokenizer

In masked shards (`tnllm data synth`; "masked" among the options) the highest bit of a stored id says that the token counts
as a label. Readers give the id without it; training and validation see only the labels that count.

Documents are stored in corpus order, each ending with the end token. A split's stream is its shards concatenated; shard
boundaries carry no meaning.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tnllm import __version__
from tnllm.errors import RunError, UserError
from tnllm.files import sha256_file, write_bytes_atomic, write_text_atomic

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.bin"
_FORMAT = "tnllm-tokens"
_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One pair of files. `file` names the .bin; `text_bytes` counts the UTF-8 bytes of its documents."""

    file: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and what it was made from.

    `position` is how far the inputs were read: the number of finished inputs, and of documents read from the next one.
    `options` are the choices that decide the tokens; a resumed run must have the same.
    """

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    options: dict[str, Any]
    inputs: list[dict[str, Any]]
    shards: list[Shard] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "bad": 0})
    position: tuple[int, int] = (0, 0)
    complete: bool = False
    created_by: str = f"tnllm {__version__}"

    def total(self, name: str, split: str | None = None) -> int:
        """Sum of `tokens`, `documents` or `text_bytes` over the shards of `split` (None: of all)."""
        return sum(getattr(shard, name) for shard in self.shards if split in (None, shard.split))

    def to_json(self) -> str:
        """The text of manifest.json."""
        splits = {
            split: {name: self.total(name, split) for name in ("documents", "tokens", "text_bytes")} for split in SPLITS
        }
        return json.dumps(
            {"format": _FORMAT, "version": _VERSION, "splits": splits, **asdict(self)},
            indent=1,
            ensure_ascii=False,
        )


def is_shard_folder(path: Path) -> bool:
    """Whether `path` is a folder that `tnllm data tokenize` wrote, finished or not."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest. Raises UserError if it is missing or this version cannot read it."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}; make token shards with: tnllm data tokenize")
    try:
        values = json.loads(path.read_bytes())
        if (values.pop("format"), values.pop("version")) != (_FORMAT, _VERSION):
            raise UserError(f"{path} has another format or version; this tnllm reads {_FORMAT} {_VERSION}")
        values.pop("splits")
        values["shards"] = [Shard(**shard) for shard in values["shards"]]
        values["position"] = tuple(values["position"])
        return Manifest(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of token shards ({error}); tokenize again") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest atomically."""
    write_text_atomic(folder / MANIFEST, manifest.to_json() + "\n")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def counted_bit(dtype: np.dtype) -> int:
    """The bit of a masked shard's ids that marks a label. No vocabulary is so large that ids need it."""
    return 1 << (8 * dtype.itemsize - 1)


def write_shard(
    folder: Path, split: str, number: int, tokens: np.ndarray, lengths: Sequence[int], text_bytes: int
) -> Shard:
    """Write one pair of files, each completely or not at all; `lengths` are the token counts of the documents."""
    index = np.zeros(len(lengths) + 1, "<u8")
    np.cumsum(lengths, out=index[1:])
    assert index[-1] == len(tokens)
    name = f"{split}-{number:05d}"
    data, index_data = tokens.tobytes(), index.tobytes()
    write_bytes_atomic(folder / f"{name}.bin", data)
    write_bytes_atomic(folder / f"{name}.idx", index_data)
    return Shard(
        file=f"{name}.bin",
        split=split,
        tokens=len(tokens),
        documents=len(lengths),
        text_bytes=text_bytes,
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(index_data).hexdigest(),
    )


def verify_hashes(folder: Path, manifest: Manifest) -> None:
    """Read every shard and compare it with its hash. Raises RunError naming the first that differs."""
    for shard in manifest.shards:
        for name, expected in ((shard.file, shard.sha256), (_index_name(shard), shard.index_sha256)):
            actual = sha256_file(folder / name)
            if actual != expected:
                raise RunError(f"{folder / name} is damaged: sha256 {actual[:12]}..., manifest {expected[:12]}...")


def _index_name(shard: Shard) -> str:
    return shard.file.removesuffix(".bin") + ".idx"


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    expected = count * dtype.itemsize
    if not path.is_file():
        raise RunError(f"{path} is missing ({expected:,} bytes in the manifest); copy it or tokenize again")
    size = os.path.getsize(path)
    if size != expected:
        raise RunError(f"{path} has {size:,} bytes, the manifest says {expected:,}; copy it or tokenize again")
    return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)


class TokenStream:
    """The tokens of one split as one circular stream. Open one with `TokenStream.open(folder, split)`."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        """Map the shards of `split`. Raises RunError naming a file that is missing or has the wrong size."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        shards = [shard for shard in manifest.shards if shard.split == split]
        dtype = np.dtype(manifest.dtype)
        self._tokens = [_map(folder / shard.file, dtype, shard.tokens) for shard in shards]
        self._index = [_map(folder / _index_name(shard), np.dtype("<u8"), shard.documents + 1) for shard in shards]
        self._first_token = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._first_document = np.cumsum([0, *(shard.documents for shard in shards)])
        self.num_tokens = int(self._first_token[-1])
        self.num_documents = int(self._first_document[-1])
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        masked = bool(manifest.options.get("masked"))
        self._bit = counted_bit(dtype) if masked else 0
        # A masked document is answered as a whole, so rows begin where documents do.
        self.row_tokens: int | None = manifest.options["seq_len"] if masked else None
        self.token_bytes = _map(folder / TOKEN_BYTES, np.dtype("<u2"), manifest.vocab_size)

    @staticmethod
    def open(folder: str | Path, split: str = "train", verify: bool = False) -> "TokenStream":
        """Open a finished folder; checks sizes, and hashes with `verify`. Raises UserError or RunError."""
        assert split in SPLITS, split
        path = Path(folder)
        manifest = read_manifest(path)
        if not manifest.complete:
            raise UserError(f"{path} is not finished; run the same 'tnllm data tokenize' again to resume")
        stream = TokenStream(path, split, manifest)
        if verify:
            verify_hashes(path, manifest)
        return stream

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from offset `start`, int64; the stream wraps around at its end."""
        return self._stored(start, count) & ~self._bit

    def counted(self, start: int, count: int) -> np.ndarray:
        """Which of these tokens count as labels, bool; without a mask all."""
        return (self._stored(start, count) & self._bit) == self._bit

    def _stored(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start < self.num_tokens, (start, self.num_tokens)
        parts = []
        while count > 0:
            shard = int(np.searchsorted(self._first_token, start, "right")) - 1
            offset = start - int(self._first_token[shard])
            part = self._tokens[shard][offset : offset + count]
            parts.append(part)
            count -= len(part)
            start = (start + len(part)) % self.num_tokens
        return np.concatenate(parts).astype(np.int64)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Indices i in [0, count), int64, where a document begins at stream offset start + i (circular)."""
        parts = []
        base = 0
        while base < count:
            shard = int(np.searchsorted(self._first_token, start, "right")) - 1
            begin = int(self._first_token[shard])
            length = min(int(self._first_token[shard + 1]) - start, count - base)
            starts = self._index[shard][:-1]
            low, high = np.searchsorted(starts, [start - begin, start - begin + length])
            parts.append(starts[low:high].astype(np.int64) + (begin - start + base))
            base += length
            start = (start + length) % self.num_tokens
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, int64, its end token included."""
        assert 0 <= number < self.num_documents, (number, self.num_documents)
        shard = int(np.searchsorted(self._first_document, number, "right")) - 1
        local = number - int(self._first_document[shard])
        begin, end = self._index[shard][local : local + 2]
        return self._tokens[shard][int(begin) : int(end)].astype(np.int64) & ~self._bit

    def max_inner_starts(self, count: int) -> int:
        """The most documents that begin inside any `count` consecutive tokens, not counting the first token."""
        starts = np.concatenate(
            [index[:-1].astype(np.int64) + begin for index, begin in zip(self._index, self._first_token, strict=False)]
            or [np.zeros(0, np.int64)]
        )
        # A window that wraps around contains the first documents again; one longer than the stream, all of them.
        head = starts[starts < count]
        laps = 1 + count // max(self.num_tokens, 1)
        later = [head + lap * self.num_tokens for lap in range(1, laps + 1)]
        ends = np.searchsorted(np.concatenate([starts, *later]), starts + count - 2, "right")
        return int((ends - np.arange(len(starts))).max(initial=0))
