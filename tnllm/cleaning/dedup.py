"""Exact and near duplicates by MinHash, in stages of tasks: sign shards, match bands, choose pairs, verify, group, drop.

    signatures/NNNNN.npy   uint32 [values, documents]: MinHash values (rensa), one row per value
    signatures/NNNNN.exact.npy, .ids.json     content hashes and names of the same documents
    pairs/NNN.npy          uint64 [K, 2]: pairs of documents that share a band, found by task NNN
    shingles/pairs.npy, documents.npy         the pairs that come near the threshold, and the documents in them
    shingles/NNNNN.bin, .index.npy            n-gram hashes of those of a shard; the documents' indices and ends
    groups.npz             verified pairs with their similarity; which documents are dropped, and for which kept one

A document's number is `shard << 32 | index in the shard`. Near duplicates are documents whose n-grams have a Jaccard
similarity J of at least the threshold. The share of equal MinHash values estimates J with a standard error of
sqrt(J (1 - J) / num_hashes). The texts of pairs that come near the threshold are read again, each shard by a task of its
own, and compared exactly, unless `verify` is "estimate". A band takes up to 64 bytes of memory a document; if the documents
exceed `memory_mb`, matching works in parts.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from tnllm.cleaning.hashing import content_hash, ngram_hashes, token_hashes
from tnllm.cleaning.records import REJECTED, read_records
from tnllm.cleaning.settings import CleanSettings, DedupSection
from tnllm.cleaning.steps import Step, count_document, reject
from tnllm.data.permutation import splitmix64
from tnllm.errors import optional_import
from tnllm.files import write_bytes_atomic, write_text_atomic

_BATCH_DOCUMENTS = 256
_BYTES_PER_DOCUMENT = 64
_VERIFY_PAIRS = 1 << 13
_MAX_LISTED_GROUP = 100
# A band of a million documents takes a few hundred milliseconds: more tasks would mostly start and stop.
MATCH_TASKS = 8


class Sign(PipelineStep):
    """Signatures of the shard's kept documents, in order."""

    type, name = "tnllm", "minhash"

    def __init__(self, folder: Path, settings: DedupSection) -> None:
        super().__init__()
        self.folder, self.settings = folder, settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        parts: list[np.ndarray] = []
        exact: list[int] = []
        names: list[str] = []
        batch: list[np.ndarray] = []
        for doc in data:
            if REJECTED not in doc.metadata:
                count_document(self, doc)
                with self.track_time():
                    exact.append(content_hash(doc.text))
                    names.append(doc.id)
                    batch.append(shingles(doc.text, self.settings))
                    if len(batch) == _BATCH_DOCUMENTS:
                        parts.append(signatures(batch, self.settings))
                        batch = []
            yield doc
        parts.append(signatures(batch, self.settings))
        base = self.folder / f"{rank:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        _save(base.with_suffix(".npy"), np.ascontiguousarray(np.concatenate(parts).T))
        _save(base.with_suffix(".exact.npy"), np.array(exact, np.uint64))
        write_text_atomic(base.with_suffix(".ids.json"), json.dumps(names, ensure_ascii=False))


def shingles(text: str, settings: DedupSection) -> np.ndarray:
    """Hashes of the distinct n-grams of a text, uint64; never empty."""
    tokens, characters = token_hashes(text)
    if not len(tokens):
        # A text without letters is a duplicate only of a text with the same characters.
        return np.array([content_hash(text)], np.uint64)
    grams = np.sort(ngram_hashes(tokens, settings.characters if characters else settings.words))
    # As np.unique, which takes ten times as long.
    return grams[np.append(True, grams[1:] != grams[:-1])]


def signatures(documents: list[np.ndarray], settings: DedupSection) -> np.ndarray:
    """MinHash values of documents given as n-gram hashes: uint32 [documents, num_hashes]."""
    with optional_import("data", "rensa"):
        from rensa import RMinHash
    if not documents:
        return np.zeros((0, settings.num_hashes), np.uint32)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(documents), offsets, settings.num_hashes, settings.seed
    )
    return np.array(matrix.to_rows(), np.uint32)


def num_bands(settings: DedupSection) -> int:
    """Bands of `rows` values; 0 if only exact duplicates are dropped."""
    return settings.num_hashes // settings.rows if settings.threshold < 1 else 0


class Match(PipelineStep):
    """Pairs of documents that agree in a band. Each task takes every `world_size`-th band; the last is content hashes."""

    type, name = "tnllm", "match"

    def __init__(self, folder: Path, out: Path, settings: DedupSection) -> None:
        super().__init__()
        self.folder, self.out, self.settings = folder, out, settings

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        total = sum(len(np.load(path, mmap_mode="r")) for path in sorted(self.folder.glob("*.exact.npy")))
        parts = max(1, -(-total * _BYTES_PER_DOCUMENT // int(self.settings.memory_mb * 2**20)))
        pairs = [np.zeros((0, 2), np.uint64)]
        with self.track_time():
            for band in range(rank, num_bands(self.settings) + 1, world_size):
                pairs += [self._match(band, part, parts) for part in range(parts)]
        self.out.mkdir(parents=True, exist_ok=True)
        _save(self.out / f"{rank:03d}.npy", _distinct(np.concatenate(pairs)))
        return iter(())

    def _match(self, band: int, part: int, parts: int) -> np.ndarray:
        hashes, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for path in sorted(self.folder.glob("*.exact.npy")):
            shard = int(path.name.split(".")[0])
            keys = self._keys(path, band)
            chosen = np.flatnonzero(keys % np.uint64(parts) == part) if parts > 1 else np.arange(len(keys))
            hashes.append(keys[chosen])
            ids.append(chosen.astype(np.uint64) | np.uint64(shard << 32))
        keys, numbers = np.concatenate(hashes), np.concatenate(ids)
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        # Each document is paired with the one before it and the first of its run, so the number of pairs is linear.
        is_first = np.ones(len(keys), bool)
        is_first[same] = False
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
        pairs = np.concatenate([[numbers[same - 1], numbers[same]], [numbers[first[same]], numbers[same]]], axis=1).T
        return _distinct(pairs)

    def _keys(self, path: Path, band: int) -> np.ndarray:
        if band == num_bands(self.settings):
            return np.load(path)
        rows = self.settings.rows
        values = np.load(path.with_name(path.name.replace(".exact", "")), mmap_mode="r")
        key = np.zeros(values.shape[1], np.uint64)
        for row in range(band * rows, (band + 1) * rows):
            key = splitmix64(key ^ values[row].astype(np.uint64))
        return key


class Signatures:
    """What signing wrote, looked up by the documents' numbers."""

    def __init__(self, folder: Path, settings: DedupSection) -> None:
        self.folder, self.settings = folder, settings

    def estimate(self, pairs: np.ndarray) -> np.ndarray:
        """Share of equal MinHash values of each pair; 1 for equal content."""
        parts = [np.zeros(0)]
        for start in range(0, len(pairs), _VERIFY_PAIRS):
            left, right = (self._gather(numbers, "") for numbers in pairs[start : start + _VERIFY_PAIRS].T)
            parts.append((left == right).mean(axis=1))
        return np.concatenate(parts)

    def same_content(self, pairs: np.ndarray) -> np.ndarray:
        """Whether the texts of each pair are equal but for case and spaces."""
        left, right = (self._gather(numbers, ".exact") for numbers in pairs.T)
        return left == right

    def _gather(self, numbers: np.ndarray, kind: str) -> np.ndarray:
        shape = (len(numbers),) if kind else (len(numbers), self.settings.num_hashes)
        result = np.empty(shape, np.uint64 if kind else np.uint32)
        for shard, chosen in _by_shard(numbers):
            values = np.load(self.folder / f"{shard:05d}{kind}.npy", mmap_mode="r")
            result[chosen] = values.T[_index(numbers[chosen])]
        return result


class Choose(PipelineStep):
    """The pairs that may reach the threshold by the estimate, and the documents in them. One task."""

    type, name = "tnllm", "choose"

    def __init__(self, folder: Path, pairs: Path, out: Path, settings: DedupSection) -> None:
        super().__init__()
        self.folder, self.pairs, self.out, self.settings = folder, pairs, out, settings

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.track_time():
            pairs = _matched(self.pairs)
            self.stat_update("candidates", value=len(pairs))
            # Four standard errors below the threshold, no true pair is lost.
            least = self.settings.threshold - 2 / self.settings.num_hashes**0.5
            pairs = pairs[Signatures(self.folder, self.settings).estimate(pairs) >= least]
            self.out.mkdir(parents=True, exist_ok=True)
            _save(self.out / "documents.npy", np.unique(pairs))
            _save(self.out / "pairs.npy", pairs)
        return iter(())


class Shingle(PipelineStep):
    """The n-gram hashes of a shard's chosen documents."""

    type, name = "tnllm", "shingle"

    def __init__(self, filtered: Path, out: Path, settings: DedupSection) -> None:
        super().__init__()
        self.filtered, self.out, self.settings = filtered, out, settings

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        chosen = np.load(self.out / "documents.npy", mmap_mode="r")
        first, last = np.searchsorted(chosen, [np.uint64(rank << 32), np.uint64((rank + 1) << 32)])
        indices = _index(chosen[first:last])
        wanted, left = set(indices.tolist()), len(indices)
        parts = [np.zeros(0, np.uint64)]
        with self.track_time():
            for index, record in enumerate(read_records(self.filtered / f"{rank:05d}.jsonl.gz") if wanted else ()):
                if index in wanted:
                    parts.append(shingles(record["text"], self.settings))
                    left -= 1
                    if not left:
                        break
            write_bytes_atomic(self.out / f"{rank:05d}.bin", np.concatenate(parts).tobytes())
            _save(
                self.out / f"{rank:05d}.index.npy",
                np.array([indices, np.cumsum([len(part) for part in parts[1:]], dtype=np.int64)]),
            )
        return iter(())


class Group(PipelineStep):
    """Join the pairs that reach the threshold into groups, keep the first document of each. One task."""

    type, name = "tnllm", "group"

    def __init__(self, folder: Path, pairs: Path, shingles: Path, out: Path, settings: DedupSection) -> None:
        super().__init__()
        self.pairs, self.shingles, self.out, self.settings = pairs, shingles, out, settings
        self.signatures = Signatures(folder, settings)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        exact = self.settings.verify == "exact"
        similarity_of = self._jaccard if exact else self.signatures.estimate
        with self.track_time():
            pairs, similarity = self._near(
                np.load(self.shingles / "pairs.npy") if exact else _matched(self.pairs), similarity_of
            )
            dropped, kept = join(pairs)
            groups, sizes = np.unique(kept, return_counts=True)
            sizes += 1
            # Matching pairs each document with few others; the result lists all pairs of a group.
            inner = list(_inner_pairs(dropped, kept, np.repeat(sizes, sizes - 1)))
            both, first = np.unique(np.concatenate([pairs, *inner]), axis=0, return_index=True)
            more, more_similarity = self._near(both[first >= len(pairs)], similarity_of)
            pairs, first = np.unique(np.concatenate([pairs, more]), axis=0, return_index=True)
            similarity = np.concatenate([similarity, more_similarity])[first]
            ends = np.stack([kept, dropped], axis=1)
            self.stat_update("groups", value=len(groups))
            self.stat_update("largest_group", value=int(sizes.max(initial=0)))
            for size, number in enumerate(np.bincount(np.minimum(sizes, 10)).tolist()):
                if number:
                    self.stat_update(f"group_size/{size if size < 10 else '10 or more'}", value=number)
            buffer = io.BytesIO()
            columns = {"pairs": pairs, "similarity": similarity, "dropped": dropped, "kept": kept}
            verdicts = {"close": similarity_of(ends), "exact": self.signatures.same_content(ends)}
            np.savez(buffer, **columns, **verdicts)  # type: ignore[arg-type]
            write_bytes_atomic(self.out, buffer.getvalue())
        return iter(())

    def _near(
        self, pairs: np.ndarray, similarity_of: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that reach the threshold, and their similarities."""
        similarity = similarity_of(pairs)
        near = similarity >= self.settings.threshold
        return pairs[near], similarity[near]

    def _jaccard(self, pairs: np.ndarray) -> np.ndarray:
        """Exact similarity of each pair."""
        result = np.zeros(len(pairs))
        for row, pair in enumerate(pairs):
            left, right = map(self._grams, pair.tolist())
            shared = len(np.intersect1d(left, right, assume_unique=True))
            result[row] = shared / (len(left) + len(right) - shared)
        return result

    def _grams(self, number: int) -> np.ndarray:
        shard = number >> 32
        indices, ends = _load_index(self.shingles / f"{shard:05d}.index.npy")
        row = int(np.searchsorted(indices, number & 0xFFFFFFFF))
        begin = ends[row - 1] if row else 0
        # Mapped files would each take a descriptor, and their pages count as this process's memory.
        return np.fromfile(self.shingles / f"{shard:05d}.bin", np.uint64, ends[row] - begin, offset=8 * begin)


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """The distinct rows in order: np.unique in half the time."""
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[first]


def _matched(folder: Path) -> np.ndarray:
    """What the tasks found, without what others found before: one file more in memory at a time."""
    pairs = np.zeros((0, 2), np.uint64)
    for path in sorted(folder.glob("*.npy")):
        pairs = _distinct(np.concatenate([pairs, np.load(path)]))
    return pairs


def _inner_pairs(dropped: np.ndarray, kept: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """All pairs of each group of 3 to 100 documents; `sizes`: of each dropped one's group, by `kept`."""
    order = np.argsort(kept, kind="stable")
    dropped, kept = dropped[order], kept[order]
    for size in np.unique(sizes[(sizes > 2) & (sizes <= _MAX_LISTED_GROUP)]).tolist():
        others = dropped[sizes == size].reshape(-1, size - 1)
        group = np.column_stack([kept[sizes == size][:: size - 1], others])
        yield group[:, np.transpose(np.triu_indices(size, 1))].reshape(-1, 2)


def _by_shard(numbers: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Each shard with the positions of its documents in `numbers`."""
    shards = numbers >> np.uint64(32)
    order = np.argsort(shards, kind="stable")
    present, starts = np.unique(shards[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    return ((shard, order[start:end]) for shard, start, end in zip(present.tolist(), starts, ends, strict=False))


def _index(numbers: np.ndarray) -> np.ndarray:
    return (numbers & np.uint64(0xFFFFFFFF)).astype(np.int64)


def join(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected groups of documents: every member but the lowest, in order, and the lowest of its group."""
    numbers, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    root = np.arange(len(numbers))
    while len(ends):
        ends = np.sort(root[ends], axis=1)
        ends = ends[ends[:, 0] != ends[:, 1]]
        np.minimum.at(root, ends[:, 1], ends[:, 0])
        while ((above := root[root]) != root).any():
            root = above
    member = root != np.arange(len(numbers))
    return numbers[member], numbers[root[member]]


class Drop(Step):
    """Documents of an earlier stage's shard, the duplicates marked as rejected."""

    name = section = "dedup"

    def __init__(self, settings: CleanSettings, kept: Path, groups: Path, names: Path) -> None:
        super().__init__(settings)
        self.kept, self.groups, self.names = kept, groups, names

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with np.load(self.groups) as groups:
            mine = groups["dropped"] >> np.uint64(32) == rank
            dropped, *columns = (groups[name][mine].tolist() for name in ("dropped", "kept", "close", "exact"))
        duplicates = {number & 0xFFFFFFFF: row for number, *row in zip(dropped, *columns, strict=True)}
        for index, record in enumerate(read_records(self.kept / f"{rank:05d}.jsonl.gz")):
            doc = Document(record.pop("text"), record.pop("id"), metadata=record)
            count_document(self, doc)
            if index in duplicates:
                of, similarity, exact = duplicates[index]
                reason = "exact duplicate" if exact else "near duplicate"
                reject(doc, self.name, reason, of=document_name(self.names, of), similarity=round(similarity, 4))
                self.count_rejected(doc)
            yield doc


def document_name(folder: Path, number: int) -> str:
    """The id of a numbered document."""
    return _load_names(folder / f"{number >> 32:05d}.ids.json")[number & 0xFFFFFFFF]


def near_pairs(groups: Path, names: Path) -> Iterator[tuple[str, str, float]]:
    """Every verified pair with its similarity, most similar first."""
    with np.load(groups) as arrays:
        pairs, similarity = arrays["pairs"], arrays["similarity"]
    for row in np.argsort(-similarity, kind="stable"):
        a, b = (int(number) for number in pairs[row])
        yield document_name(names, a), document_name(names, b), float(similarity[row])


@lru_cache(maxsize=64)
def _load_names(path: Path) -> list[str]:
    return json.loads(path.read_text("utf-8"))


@lru_cache(maxsize=1024)
def _load_index(path: Path) -> np.ndarray:
    return np.load(path)


def _save(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_bytes_atomic(path, buffer.getvalue())
