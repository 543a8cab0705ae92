"""Conversations packed into rows, behind the interface of `loader.Loader`.

    packed = pack(read_conversations(files), tokenizer, template, seq_len=2048)
    train, validation = packed.split(0.02)
    loader = InstructLoader(train, batch_size=32, seed=0)
    batch = loader.batch(first_sample=0, num_rows=4)      # tokens, labels, cu_seqlens, num_bytes, num_labels

Rows are filled best-fit, longest conversation first, so little of a row is padding. `cu_seqlens` keeps the conversations
of a row apart. Which conversations share a row is fixed; the order of rows changes with each pass. A batch is a pure
function of seed and global sample index.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tnllm.data.instruct import Conversation, encode
from tnllm.data.loader import IGNORE, Batch, Mix
from tnllm.data.permutation import permute
from tnllm.errors import UserError
from tnllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Packed:
    """Encoded conversations: `ids[i]` [n] int64, `counted[i]` [n] bool (learned tokens).

    Of the conversations given, `cut` were truncated to a row, and `dropped` had no answer to learn, or none within a row.
    """

    ids: list[np.ndarray]
    counted: list[np.ndarray]
    seq_len: int
    token_bytes: np.ndarray
    cut: int = 0
    dropped: int = 0

    def split(self, fraction: float) -> tuple["Packed", "Packed"]:
        """Training and validation; validation takes about `fraction` of the conversations, evenly spaced."""
        count = len(self.ids)
        num_held_out = round(count * fraction)
        if fraction > 0 and count > 1:
            num_held_out = min(max(1, num_held_out), count - 1)
        chosen = {(2 * i + 1) * count // (2 * num_held_out) for i in range(num_held_out)}
        return self._part([i for i in range(count) if i not in chosen]), self._part(sorted(chosen))

    def _part(self, which: Sequence[int]) -> "Packed":
        return Packed([self.ids[i] for i in which], [self.counted[i] for i in which], self.seq_len, self.token_bytes)


def pack(conversations: Iterable[Conversation], tokenizer: Tokenizer, template: str, seq_len: int) -> Packed:
    """Encode for rows of `seq_len` tokens. A longer conversation is truncated; one without any answer is left out.

    Raises UserError if no conversation is left.
    """
    ids, counted = [], []
    cut = dropped = 0
    for conversation in conversations:
        if not conversation.has_answer:
            dropped += 1
            continue
        tokens, learned = encode(conversation, tokenizer, template)
        # A row of T tokens has T labels, shifted by one: a conversation of T + 1 tokens fills it.
        if len(tokens) > seq_len + 1:
            tokens, learned = tokens[: seq_len + 1], learned[: seq_len + 1]
            if not learned.any():
                dropped += 1
                continue
            cut += 1
        ids.append(tokens)
        counted.append(learned)
    if not ids:
        raise UserError(
            f"none of {dropped} conversations has an answer within data.seq_len {seq_len} tokens; raise data.seq_len or "
            "check the file"
        )
    token_bytes = np.array([len(piece) for piece in tokenizer.token_bytes], np.int64)
    return Packed(ids, counted, seq_len, token_bytes, cut, dropped)


def fill_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Best-fit packing of items of `lengths` <= seq_len: longest first, each into the fullest row with room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = bisect_left(room, (lengths[item], -1))
        if fit == len(room):
            rows.append([item])
            free, row = seq_len - lengths[item], len(rows) - 1
        else:
            space, row = room.pop(fit)
            rows[row].append(item)
            free = space - lengths[item]
        if free > 0:
            insort(room, (free, row))
    return rows


class InstructLoader:
    """Cuts batches from packed conversations. It has no position: `batch` is a function of its arguments."""

    def __init__(
        self,
        packed: Packed | Sequence[tuple[Packed, float | None]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """`packed`: conversations, or several sources of them with their mixing weights (None: the share of its tokens).

        `batch_size` counts the rows of one step over all ranks. Raises UserError if ranks do not divide it.
        """
        if batch_size % world_size:
            raise UserError(f"{batch_size} rows a step do not divide over {world_size} ranks; change one of them")
        given = [(packed, None)] if isinstance(packed, Packed) else packed
        self.sources = [source for source, _ in given]
        self.seq_len, self.batch_size, self.shuffle = self.sources[0].seq_len, batch_size, shuffle
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._token_bytes = self.sources[0].token_bytes
        # The last token of a conversation is only ever a label.
        self._rows = [fill_rows([len(ids) - 1 for ids in source.ids], self.seq_len) for source in self.sources]
        sizes = [float(sum(map(len, source.ids))) for source in self.sources]
        self._mix = Mix.of([size if weight is None else weight for size, (_, weight) in zip(sizes, given, strict=True)])
        # One more for the padding at the end of a row.
        self.max_row_sequences = 1 + max(len(row) for rows in self._rows for row in rows)

    @property
    def num_rows(self) -> int:
        """Rows of one pass."""
        return sum(map(len, self._rows))

    @property
    def num_labels(self) -> int:
        """Learned tokens of one pass."""
        return int(sum(counted[1:].sum() for source in self.sources for counted in source.counted))

    def rank_samples(self, first_sample: int) -> range:
        """The global samples of this rank in the step whose first sample is `first_sample`."""
        rows = self.batch_size // self._world_size
        return range(first_sample + self._rank * rows, first_sample + (self._rank + 1) * rows)

    def batch(self, first_sample: int, num_rows: int) -> Batch:
        """Global samples `first_sample` to `first_sample + num_rows - 1`: tokens and labels [1, num_rows * T].

        `cu_seqlens` is padded to a fixed length with its last value. Without shuffling, samples past the last row are
        rows of ignored labels.
        """
        assert first_sample >= 0 and num_rows > 0, (first_sample, num_rows)
        length = self.seq_len
        tokens = np.zeros((num_rows, length), np.int64)
        labels = np.full((num_rows, length), IGNORE, np.int64)
        cu_seqlens = np.full(num_rows * self.max_row_sequences + 1, num_rows * length, np.int32)
        ends = [0]
        for row in range(num_rows):
            offset = 0
            source, items = self._items(first_sample + row)
            for item in items:
                ids, counted = source.ids[item], source.counted[item]
                size = len(ids) - 1
                tokens[row, offset : offset + size] = ids[:-1]
                labels[row, offset : offset + size] = np.where(counted[1:], ids[1:], IGNORE)
                offset += size
                ends.append(row * length + offset)
            if offset < length:
                ends.append((row + 1) * length)
        cu_seqlens[: len(ends)] = ends
        learned = labels[labels != IGNORE]
        return Batch(
            torch.from_numpy(tokens.reshape(1, -1)),
            torch.from_numpy(labels.reshape(1, -1)),
            torch.from_numpy(cu_seqlens),
            int(self._token_bytes[learned].sum()),
            len(learned),
            length,
            len(ends) - 1,
        )

    def _items(self, sample: int) -> tuple[Packed, list[int]]:
        """The conversations of one global sample, and the source that they are of."""
        if self.shuffle:
            index, nth = self._mix.locate(sample)
            rows = self._rows[index]
            epoch, row = divmod(nth, len(rows))
            key = self._seed * 1_000_003 + epoch + (index << 40)
            return self.sources[index], rows[permute(row, len(rows), key)]
        for source, rows in zip(self.sources, self._rows, strict=True):
            if sample < len(rows):
                return source, rows[sample]
            sample -= len(rows)
        return self.sources[0], []
