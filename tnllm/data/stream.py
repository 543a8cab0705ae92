"""A source that is tokenized while training reads it, into chunks on disk that take at most so many bytes.

stream = ChunkStream("s3://bucket/corpus/", Path("run/stream"), tokenizer, Options(), seq_len=2048, disk_bytes=8e9)
Loader([Source(stream)], seq_len=2048, batch_size=32)       # as with a TokenStream, shuffled
stream.close()

- Order: a pass takes the files in the order of a permutation chosen by seed and pass, the documents of a file as they
  come. The passes follow one another without end; their tokens, cut every `rows * seq_len`, are the chunks.
- Rows are shuffled inside their chunk, so which row a sample is depends on seed, files and chunk size alone: not on ranks,
  workers, timing, or what is on disk. A chunk is an eighth of the disk, at most 2^26 tokens.
- A thread of one process (the one that holds the folder's lock) writes chunks ahead; all ranks read the folder. If that
  process ends, another takes over. All of a step's samples lie in two neighbouring chunks.
- It removes the oldest chunks when the next one would exceed the disk: a second pass fetches and tokenizes again.
- chunks.json says where each chunk begins: pass, file, document, token. A checkpoint holds that of its samples, so a
  resumed run reads on from there, with or without the folder, and gets the same rows.
- Held-out documents (by a hash of their text) are never trained on; validation has those met before the end of chunk 0.
- A file is what it was when it was listed (ETag or date, size; of a local file, time and size), or it is refused: in a
  run, between runs of a folder, and through the checkpoint's fingerprint.
- Beside the chunks the disk holds one source file. What cannot be read is left out, named and counted.
"""

import atexit
import json
import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tnllm.data.encode import Encoded, Options, encode_groups, read_groups
from tnllm.data.permutation import permute, splitmix64
from tnllm.data.remote import RemoteFile, check_unchanged, described_sources
from tnllm.data.shards import TOKEN_BYTES, Manifest, Shard, TokenStream, token_dtype, write_shard
from tnllm.data.tokenize import begin_folder, cache_folder, inputs_of, new_manifest, num_cores
from tnllm.errors import UserError
from tnllm.files import only_writer, read_json, write_text_atomic
from tnllm.progress import log
from tnllm.tokenizer import Tokenizer

INDEX = "chunks.json"
_MAX_CHUNK_TOKENS = 1 << 26
_CHUNKS = 8
_POSITIONS = 1000
_POLL_S = 0.1
_MOST_WAIT_S = 20.0


@dataclass(frozen=True)
class Position:
    """Where a chunk begins: after so many passes, files and documents, and `token` tokens of what follows."""

    epoch: int = 0
    file: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class _Chunk:
    """`tokens` are those of the chunk and the first of the next one; `lengths` divide them at the starts of documents."""

    tokens: np.ndarray
    lengths: list[int]
    held_out: list[np.ndarray]
    following: Position


class ChunkStream:
    """The endless token stream of a source's training documents, a window of which is on disk."""

    split = "train"

    def __init__(
        self,
        source: str,
        folder: Path,
        tokenizer: Tokenizer,
        options: Options,
        seq_len: int,
        disk_bytes: float,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        """List the files of `source` and check them against an earlier run's; no text is read yet.

        The chunks lie in a folder of their own below `folder`. Raises UserError for a source that changed or is too small a
        disk for rows of `seq_len`, and what `find_sources` raises.
        """
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.rows = min(int(disk_bytes / _CHUNKS / self._dtype.itemsize), _MAX_CHUNK_TOKENS) // seq_len
        if self.rows < 1:
            needed = _CHUNKS * self._dtype.itemsize * seq_len / 1e9
            raise UserError(
                f"{disk_bytes / 1e9:g} GB hold no row in each of {_CHUNKS} chunks; give {needed:g} GB or more"
            )
        self.num_tokens = self.rows * seq_len
        self.source, self.disk_bytes = source, disk_bytes
        self._tokenizer, self._options, self._seed = tokenizer, options, seed
        self._workers = workers or max(1, min(8, num_cores() // 2))
        self.files = described_sources(source)
        fresh = new_manifest([], tokenizer, options)
        fresh = replace(fresh, options=fresh.options | {"chunk_tokens": self.num_tokens, "seed": seed})
        self.folder = cache_folder(folder, source.rstrip("/").rpartition("/")[2], fresh, [source])
        fresh = replace(fresh, inputs=inputs_of(self.files))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest: Manifest = begin_folder(self.folder, fresh, tokenizer, overwrite=False, outer_command=True)
        self.token_bytes = np.fromfile(self.folder / TOKEN_BYTES, "<u2")
        self._known: dict[int, Position] = {0: Position()}
        self._open: dict[int, TokenStream] = {}
        self._wanted = 0
        self._thread: threading.Thread | None = None
        self._is_writer = False
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._asked = threading.Condition()

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from offset `start` of the endless stream, int64; a chunk and one token at most."""
        return self._chunk(start // self.num_tokens).read(start % self.num_tokens, count)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Indices i in [0, count), int64, where a document begins at stream offset start + i; the first may be a part."""
        return self._chunk(start // self.num_tokens).document_starts(start % self.num_tokens, count)

    def validation(self) -> TokenStream:
        """The documents held out of the first chunk, which is tokenized first if it never was."""
        if self._options.val_fraction and not self._held_out():
            self._chunk(0)
        return TokenStream(self.folder, "val", replace(self.manifest, shards=self._held_out()))

    def position(self, row: int) -> dict[str, Any] | None:
        """What a checkpoint needs in order to read on from `row`, counted from the start of the stream; None if unknown."""
        number = row // self.rows
        written = self._read_index()["positions"].get(str(number))
        position = Position(**written) if written else self._known.get(number)
        return {"chunk": number, "position": asdict(position)} if position else None

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Take up a checkpoint's `position`, so that earlier chunks need not be made again."""
        if saved is not None:
            self._known[saved["chunk"]] = Position(**saved["position"])

    def close(self) -> None:
        """Stop the thread that writes ahead, after the group of documents it is at. The chunks stay for the next run."""
        self._stop.set()
        with self._asked:
            self._asked.notify_all()
        if self._thread is not None and self._is_writer:
            # A process that ends while its thread is in the tokenizer's C++ code aborts. A transfer is not waited for.
            self._thread.join(_MOST_WAIT_S)
        atexit.unregister(self.close)

    def _chunk(self, number: int) -> TokenStream:
        """A chunk as a token stream; waits until it is on disk."""
        if number not in self._open:
            self._wanted = number
            with self._asked:
                self._asked.notify_all()
            told = False
            while (shard := self._shards().get(number)) is None:
                if self._thread is None:
                    atexit.register(self.close)
                    self._thread = threading.Thread(target=self._produce, name="tokenize", daemon=True)
                    self._thread.start()
                if self._error is not None:
                    raise self._error
                if not told and self._thread.is_alive():
                    log(f"tokenizing {self.num_tokens:,} tokens of {self.source} (chunk {number})")
                    told = True
                with self._asked:
                    self._asked.wait(_POLL_S)
            kept = {old: chunk for old, chunk in self._open.items() if abs(old - number) == 1}
            self._open = kept | {number: TokenStream(self.folder, "train", replace(self.manifest, shards=[shard]))}
        return self._open[number]

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        return read_json(path) if path.is_file() else {"positions": {}, "chunks": {}, "held_out": None}

    def _shards(self) -> dict[int, Shard]:
        """The chunks on disk."""
        shards = {int(number): Shard(**shard) for number, shard in self._read_index()["chunks"].items()}
        return {number: shard for number, shard in shards.items() if (self.folder / shard.file).is_file()}

    def _held_out(self) -> list[Shard]:
        return [Shard(**shard) for shard in self._read_index()["held_out"] or []]

    def _produce(self) -> None:
        """Write the wanted chunk, and chunks ahead of it while there is room; runs in a thread until `close`."""
        try:
            # The run's own lock keeps other runs away, so one left by a machine that is gone means nothing here.
            with only_writer(self.folder, force=True, wait_s=float("inf")):
                self._is_writer = True
                for leftover in self.folder.glob("*.tmp-*"):
                    leftover.unlink()
                self._write_chunks()
        except Exception as error:  # shown by the thread that waits for a chunk
            self._error = error
        with self._asked:
            self._asked.notify_all()

    def _write_chunks(self) -> None:
        at, chunks = 1 << 62, self._chunks(Position(), first=True)
        while not self._stop.is_set():
            number = self._next()
            if number is None:
                with self._asked:
                    self._asked.wait(_POLL_S)
                continue
            saved = self._read_index()["positions"].items()
            positions = {int(n): Position(**p) for n, p in saved} | self._known
            nearest = max(n for n in positions if n <= number)
            if not at <= number or nearest > at:
                chunks.close()
                at, chunks = nearest, self._chunks(positions[nearest], first=nearest == 0)
            if (chunk := next(chunks, None)) is None:
                break
            self._write(at, chunk, keep=at == number)
            at += 1
            with self._asked:
                self._asked.notify_all()
        chunks.close()

    def _next(self) -> int | None:
        """The chunk to write now: the wanted one, else the first missing one after it if there is room."""
        wanted, shards = self._wanted, self._shards()
        if self._options.val_fraction and not self._held_out():
            return 0
        number = next(n for n in range(wanted, wanted + len(shards) + 1) if n not in shards)
        # What is needed now, and by ranks that are a row ahead, is written in any case.
        return number if number <= wanted + 1 or self._make_room(shards, number) else None

    def _make_room(self, shards: dict[int, Shard], number: int) -> bool:
        """Remove chunks that are behind, or far ahead, until one more fits. Whether it does."""
        index = self._read_index()
        sizes = {
            n: sum((self.folder / s.file).with_suffix(suffix).stat().st_size for suffix in (".bin", ".idx"))
            for n, s in shards.items()
        }
        room = self.disk_bytes - 1.2 * self._dtype.itemsize * self.num_tokens
        removable = sorted(n for n in shards if n < self._wanted - 1) + sorted(
            (n for n in shards if n > number), reverse=True
        )
        for old in removable:
            if sum(sizes.values()) <= room:
                break
            del sizes[old], index["chunks"][str(old)]
            write_text_atomic(self.folder / INDEX, json.dumps(index))
            for suffix in (".bin", ".idx"):
                (self.folder / shards[old].file).with_suffix(suffix).unlink()
        return sum(sizes.values()) <= room

    def _write(self, number: int, chunk: _Chunk, keep: bool) -> None:
        index = self._read_index()
        if number == 0 and not index["held_out"]:
            lengths = [len(ids) for ids in chunk.held_out]
            tokens = np.concatenate(chunk.held_out or [np.zeros(0, self._dtype)])
            index["held_out"] = [asdict(write_shard(self.folder, "val", 0, tokens, lengths, 0))]
        if keep:
            self._make_room(self._shards(), number)
            index["chunks"] = self._read_index()["chunks"]
            shard = write_shard(self.folder, "train", number, chunk.tokens, chunk.lengths, 0)
            index["chunks"][str(number)] = asdict(shard)
        index["positions"][str(number + 1)] = asdict(chunk.following)
        index["positions"] = dict(list(index["positions"].items())[-_POSITIONS:])
        write_text_atomic(self.folder / INDEX, json.dumps(index))

    def _chunks(self, position: Position, first: bool) -> Generator[_Chunk, None, None]:
        """Chunks one after the other from a position; held-out documents are collected for the `first` of all."""
        needed = self.num_tokens + 1
        # Of each group in the buffer: where it is in the source, its tokens, and the lengths of its documents.
        buffer: list[tuple[Position, np.ndarray, np.ndarray]] = []
        held_out: list[np.ndarray] = []
        have = -position.token
        with closing(self._groups(replace(position, token=0))) as groups:
            for at, encoded in groups:
                lengths, is_val = np.array(encoded.lengths, np.int64), np.array(encoded.is_val, bool)
                if first:
                    parts = np.split(encoded.tokens, np.cumsum(lengths))[:-1]
                    held_out += [part for part, chosen in zip(parts, is_val, strict=True) if chosen]
                buffer.append((at, encoded.tokens[np.repeat(~is_val, lengths)], lengths[~is_val]))
                have += int(lengths[~is_val].sum())
                while have >= needed:
                    chunk, buffer, token = self._cut(buffer, position.token, held_out)
                    position = replace(buffer[0][0], token=token)
                    have = sum(len(ids) for _, ids, _ in buffer) - token
                    yield chunk
                    held_out, first = [], False

    def _cut(
        self, buffer: list[tuple[Position, np.ndarray, np.ndarray]], skip: int, held_out: list[np.ndarray]
    ) -> tuple[_Chunk, list[tuple[Position, np.ndarray, np.ndarray]], int]:
        """A chunk from `skip` tokens into the buffer on, the buffer from its end on, and how far into that the end is."""
        ids = np.concatenate([part for _, part, _ in buffer])
        starts = np.concatenate([[0], np.cumsum(np.concatenate([lengths for _, _, lengths in buffer]))]) - skip
        end = self.num_tokens
        inner = starts[(starts > 0) & (starts <= end)]
        firsts = np.cumsum([0, *(len(part) for _, part, _ in buffer)]) - skip
        group = int(np.searchsorted(firsts, end, "right")) - 1
        token = end - int(firsts[group])
        following = replace(buffer[group][0], token=token)
        lengths = np.diff([0, *inner, end + 1]).tolist()
        return _Chunk(ids[skip : skip + end + 1], lengths, held_out, following), buffer[group:], token

    def _groups(self, position: Position) -> Generator[tuple[Position, Encoded], None, None]:
        """Encoded groups of documents without end, each with its position. Raises UserError for a source without text."""
        tokens, is_full_pass = 0, position == Position()
        for epoch in range(position.epoch, 1 << 62):
            files = self.order(epoch)
            start = (position.file, position.document) if epoch == position.epoch else (0, 0)
            manifest = replace(self.manifest, inputs=inputs_of(files), position=start, skipped={"empty": 0, "bad": 0})
            at = Position(epoch, *start)
            groups = read_groups(files, manifest, self._options, "skip", folder=self.folder)
            # Which documents are held out must not depend on which comes first in a pass.
            plain = (replace(group, holds_first=False) for group in groups)
            with (
                closing(groups),
                closing(encode_groups(plain, self._tokenizer, self._options, self._workers)) as encoded,
            ):
                for group, result in encoded:
                    if self._stop.is_set():
                        return
                    for file in files[at.file : at.file + 1]:
                        check_unchanged(file, only_local=True)
                    yield at, result
                    at = Position(epoch, *group.position)
                    tokens += sum(n for n, is_val in zip(result.lengths, result.is_val, strict=True) if not is_val)
            if is_full_pass and not tokens:
                raise UserError(f"{self.source} holds no text to train on in {len(files)} files")

    def order(self, epoch: int) -> list[RemoteFile]:
        """The files in the order of a pass."""
        key = splitmix64(splitmix64(splitmix64(self._seed)) ^ epoch)
        return [self.files[permute(number, len(self.files), key)] for number in range(len(self.files))]
