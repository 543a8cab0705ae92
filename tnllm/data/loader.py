"""Batches of token rows as a pure function of (seed, global sample index), for any number of ranks and any resume point.

train = TokenStream.open("corpus-tokens", "train")
loader = Loader([Source(train)], seq_len=2048, batch_size=32, seed=0, rank=rank, world_size=world_size)
rows = loader.rank_samples(first_sample)             # this rank's rows of the step that starts there
batch = loader.batch(rows.start, num_rows=4)         # tokens, labels, cu_seqlens, num_bytes, num_labels
validation = Loader([Source(val)], seq_len=2048, batch_size=8, shuffle=False)   # every token once, in order

A sample is a row of `seq_len` tokens and their `seq_len` labels. A fixed low-discrepancy table maps samples to sources,
so any range of samples has nearly the mixing weights. Within a source, the rows of one pass (epoch) come in the order of
a stateless permutation, and every pass cuts the circular token stream at a new offset. So a token is seen once a pass
(fewer than `seq_len` tokens twice). Of a `ChunkStream`, which has no end, the rows of each chunk are permuted instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tnllm.data.permutation import permute, splitmix64
from tnllm.data.shards import TokenStream
from tnllm.data.stream import ChunkStream
from tnllm.errors import UserError

IGNORE = -100
# `Batch.trimmed` leaves a multiple of this many sequences: few shapes occur, so a compiled model is rarely compiled again.
_TRIMMED_TO = 256
# Mixing weights are rounded to multiples of 1 / 4096; each source gets at least one slot.
_SLOTS = 4096


@dataclass(frozen=True)
class Source:
    """A token stream and its share of the samples; with weight None, its share of all tokens."""

    stream: TokenStream | ChunkStream
    weight: float | None = None


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model.

    packing "reset": tokens and labels [1, rows * T] int64; cu_seqlens [K] int32 starts a sequence at every row and every
    document and is padded to a fixed K by repeating its last value. packing "concat": tokens and labels [rows, T], no
    cu_seqlens. A label is the next token. It is -100 where that token belongs to another document ("reset") or has been
    counted already (the end of a pass that is not shuffled). `num_labels` counts the other labels, and `num_bytes` the
    UTF-8 bytes of text that they stand for (0 for an end token). No sequence is longer than `longest` tokens, and
    `num_sequences` of them are not empty (None: unknown).
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    num_bytes: int
    num_labels: int
    longest: int | None = None
    num_sequences: int | None = None

    def trimmed(self) -> "Batch":
        """The same batch with fewer empty sequences at the end of `cu_seqlens`, whose length then varies in steps."""
        if self.cu_seqlens is None or self.num_sequences is None:
            return self
        kept = -(-self.num_sequences // _TRIMMED_TO) * _TRIMMED_TO + 1
        return replace(self, cu_seqlens=self.cu_seqlens[:kept])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`. For a GPU, memory is pinned first: an unpinned copy waits for all queued GPU work."""

        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        cu_seqlens = None if self.cu_seqlens is None else moved(self.cu_seqlens)
        return replace(self, tokens=moved(self.tokens), labels=moved(self.labels), cu_seqlens=cu_seqlens)


class Loader:
    """Cuts rows from sources. It has no position: `batch` is a function of its arguments."""

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: Literal["reset", "concat"] = "reset",
        shuffle: bool = True,
    ) -> None:
        """`batch_size` counts the rows of one step over all ranks. Raises UserError for bad input."""
        assert 0 <= rank < world_size, (rank, world_size)
        assert packing in ("reset", "concat"), packing
        if not sources:
            raise UserError("no data source is given; name at least one folder of token shards")
        if batch_size % world_size:
            raise UserError(f"{batch_size} rows a step do not divide over {world_size} ranks; change one of them")
        for source in sources:
            _check(source, sources[0])
            _check_chunks(source, batch_size, len(sources))
            _check_masked(source, seq_len)
        self.sources = list(sources)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.packing = packing
        self.shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._token_bytes = sources[0].stream.token_bytes.astype(np.int64)
        self._streams = [source.stream for source in sources]
        # A shuffled pass is circular. A pass in order has labels for all tokens but the first.
        self._rows = [-(-(s.num_tokens - (not shuffle)) // seq_len) for s in self._streams]
        self._mix = Mix.of([_share(source) for source in sources])
        self.chunked = [stream for stream in self._streams if isinstance(stream, ChunkStream)]
        assert shuffle or not self.chunked
        known = [stream.max_inner_starts(seq_len) for stream in self._streams if isinstance(stream, TokenStream)]
        self.max_row_sequences = 1 + max(known, default=0)

    @property
    def masked(self) -> bool:
        """Whether some tokens do not count as labels."""
        return any(map(_row_tokens, self._streams))

    @property
    def row_pairs(self) -> tuple[int, list[int]]:
        """Tokens of a masked document, and the numbers of pairs of documents in turn; several sources count as one."""
        first = self._streams[0]
        pairs = first.manifest.options["pairs"] if len(self._streams) == 1 else 0
        return _row_tokens(first) or self.seq_len, pairs if isinstance(pairs, list) else [pairs]

    @property
    def num_rows(self) -> int:
        """Rows of one pass over every source; of one that is tokenized while it is read, rows of a chunk."""
        return sum(self._rows)

    def positions(self, samples: int) -> list[dict[str, Any] | None]:
        """Where each chunked source continues after `samples` samples, for a checkpoint and `restore`."""
        counts = self._mix.counts(samples)
        rows = [count for count, stream in zip(counts, self._streams, strict=True) if stream in self.chunked]
        return [stream.position(row) for stream, row in zip(self.chunked, rows, strict=True)]

    def restore(self, positions: list[dict[str, Any] | None]) -> None:
        """Take up the `positions` of a checkpoint of the same data."""
        for stream, position in zip(self.chunked, positions, strict=False):
            stream.restore(position)

    def close(self) -> None:
        for stream in self.chunked:
            stream.close()

    def rank_samples(self, first_sample: int) -> range:
        """The global samples of this rank in the step whose first sample is `first_sample`."""
        rows = self.batch_size // self._world_size
        return range(first_sample + self._rank * rows, first_sample + (self._rank + 1) * rows)

    def batch(self, first_sample: int, num_rows: int) -> Batch:
        """Global samples `first_sample` to `first_sample + num_rows - 1`. See `Batch` for the shapes.

        Without shuffling, samples past the last row are rows of ignored labels, so all ranks run the same steps.
        """
        assert first_sample >= 0 and num_rows > 0, (first_sample, num_rows)
        rows = [self._row(first_sample + i) for i in range(num_rows)]
        tokens = np.stack([row[0] for row in rows])
        labels = np.stack([row[1] for row in rows])
        counted = labels[labels != IGNORE]
        num_bytes = int(self._token_bytes[counted].sum())
        if self.packing == "concat":
            return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), None, num_bytes, len(counted))
        cu_seqlens = torch.from_numpy(self._cu_seqlens([row[2] for row in rows]))
        # A sequence is a document's part of one row, so a row bounds it.
        sequences = num_rows + sum(len(row[2][row[2] < self.seq_len]) for row in rows)
        flat, targets = torch.from_numpy(tokens.reshape(1, -1)), torch.from_numpy(labels.reshape(1, -1))
        return Batch(flat, targets, cu_seqlens, num_bytes, len(counted), self.seq_len, sequences)

    def _row(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [T], labels [T] and the offsets in [1, T] where a document starts."""
        stream, start, counted = self._locate(sample)
        ids = stream.read(start, self.seq_len + 1)
        tokens, labels = ids[:-1], ids[1:].copy()
        labels[max(counted, 0) :] = IGNORE
        if _row_tokens(stream):
            assert isinstance(stream, TokenStream)
            labels[~stream.counted(start, self.seq_len + 1)[1:]] = IGNORE
        starts = stream.document_starts(start, self.seq_len + 1)
        starts = starts[starts > 0]
        if self.packing == "reset":
            labels[starts - 1] = IGNORE
        return tokens, labels, starts

    def _locate(self, sample: int) -> tuple[TokenStream | ChunkStream, int, int]:
        """Stream, start offset and number of counted labels of one sample."""
        if self.shuffle:
            source, nth = self._mix.locate(sample)
            stream, rows = self._streams[source], self._rows[source]
            epoch, row = divmod(nth, rows)
            key = splitmix64(splitmix64(splitmix64(self._seed) ^ source) ^ epoch)
            if isinstance(stream, ChunkStream):
                return stream, (epoch * rows + permute(row, rows, key)) * self.seq_len, self.seq_len
            unit = stream.row_tokens or 1
            start = key % stream.num_tokens // unit * unit + permute(row, rows, key) * self.seq_len
            return stream, start % stream.num_tokens, self.seq_len
        for stream, rows in zip(self._streams, self._rows, strict=True):
            if sample < rows:
                start = sample * self.seq_len
                return stream, start, stream.num_tokens - 1 - start
            sample -= rows
        return self._streams[0], 0, 0

    def _cu_seqlens(self, row_starts: list[np.ndarray]) -> np.ndarray:
        total = len(row_starts) * self.seq_len
        most = self.max_row_sequences
        if self.chunked and (needed := 1 + max(map(len, row_starts))) > most:
            # No one knows the most of a source that has not been read; powers of two keep the number of shapes small.
            most = min(1 << (needed - 1).bit_length(), self.seq_len + 1)
        result = np.full(len(row_starts) * most + 1, total, np.int32)
        ends = [[0]] + [
            row * self.seq_len + np.union1d(starts, [self.seq_len]) for row, starts in enumerate(row_starts)
        ]
        offsets = np.concatenate(ends)
        result[: len(offsets)] = offsets
        return result


def _check(source: Source, first: Source) -> None:
    stream = source.stream
    where = f"the {stream.split} split of {stream.folder}"
    if isinstance(stream, TokenStream) and stream.num_tokens < 2:
        hint = "raise --val-fraction when tokenizing" if stream.split == "val" else "tokenize a corpus with text"
        raise UserError(f"{where} holds {stream.num_documents} documents and no tokens to learn from; {hint}")
    if source.weight is not None and not 0 < source.weight < float("inf"):
        raise UserError(f"the mixing weight of {stream.folder} is {source.weight}; give a number above 0")
    if stream.manifest.tokenizer_sha256 != first.stream.manifest.tokenizer_sha256:
        raise UserError(f"{stream.folder} and {first.stream.folder} were made with different tokenizers; use one")


def _check_chunks(source: Source, batch_size: int, num_sources: int) -> None:
    stream = source.stream
    if not isinstance(stream, ChunkStream):
        return
    if batch_size > stream.rows:
        needed = stream.disk_bytes / 1e9 * batch_size / stream.rows
        raise UserError(
            f"a step of {batch_size} rows is more than a chunk of {stream.source}, {stream.rows} rows; raise "
            f"data.stream_gb to {needed:.3g}, or take a smaller step"
        )
    if num_sources > 1 and source.weight is None:
        raise UserError(
            f"how many tokens {stream.source} holds is not known before it was read; give each of the {num_sources} "
            "sources a weight: {path: ..., weight: 0.5}"
        )


def _row_tokens(stream: TokenStream | ChunkStream) -> int | None:
    return stream.row_tokens if isinstance(stream, TokenStream) else None


def _check_masked(source: Source, seq_len: int) -> None:
    unit = _row_tokens(source.stream)
    if unit and seq_len % unit:
        raise UserError(
            f"data.seq_len is {seq_len}, but the rows of {source.stream.folder} have {unit}: give a multiple"
        )


def _share(source: Source) -> float:
    return float(source.stream.num_tokens) if source.weight is None else source.weight


@dataclass(frozen=True)
class Mix:
    """Which source each sample comes from: a table of slots, repeated."""

    source: np.ndarray  # [slots] source of a slot
    before: np.ndarray  # [slots + 1, sources] samples of each source in earlier slots

    @staticmethod
    def of(weights: Sequence[float]) -> "Mix":
        """Fill each slot with the source that is furthest behind its share, so that none is ever a sample ahead."""
        if len(weights) == 1:
            return Mix(np.zeros(1, np.int64), np.array([[0], [1]]))
        quota = np.maximum(1, np.rint(np.array(weights) / sum(weights) * _SLOTS).astype(np.int64))
        slots = int(quota.sum())
        share = quota / slots
        before = np.zeros((slots + 1, len(weights)), np.int64)
        source = np.zeros(slots, np.int64)
        for slot in range(slots):
            source[slot] = np.argmax(share * (slot + 1) - before[slot])
            before[slot + 1] = before[slot]
            before[slot + 1, source[slot]] += 1
        return Mix(source, before)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of `sample` and how many earlier samples came from it."""
        source = int(self.source[sample % len(self.source)])
        return source, self.counts(sample)[source]

    def counts(self, sample: int) -> list[int]:
        """Samples of each source before `sample`."""
        period, slot = divmod(sample, len(self.source))
        return [int(count) for count in period * self.before[-1] + self.before[slot]]
