"""An index of the n-grams of evaluation sets, to detect documents that contain one.

index = build_index(eval_files(["eval/"]), words=13, characters=24)
index.save(path); Index.load(path).hits(text)     # the file of each shared n-gram

Long questions and passages match by any `words` (Chinese: `characters`) consecutive ones, as in GPT-3 and its successors
(arXiv 2005.14165, appendix C). A shorter item matches as a unit if it has at least eight words or twelve characters.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnllm.cleaning.hashing import ngram_hashes, token_hashes
from tnllm.data.folders import files_below
from tnllm.errors import UserError
from tnllm.files import write_bytes_atomic

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
_MIN_WORDS, _MIN_CHARACTERS = 8, 12


@dataclass(frozen=True)
class Index:
    """Sorted hashes [N] uint64 and the file each came from; `sizes` are the n-gram lengths that occur."""

    hashes: np.ndarray
    files: np.ndarray
    names: tuple[str, ...]
    word_sizes: tuple[int, ...]
    character_sizes: tuple[int, ...]

    def hits(self, text: str) -> list[str]:
        """The evaluation file of every n-gram of `text` that is in the index."""
        names: list[str] = []
        tokens, characters = token_hashes(text)
        for size in self.character_sizes if characters else self.word_sizes:
            if len(tokens) >= size and len(self.hashes):
                grams = ngram_hashes(tokens, size)
                indices = np.minimum(np.searchsorted(self.hashes, grams), len(self.hashes) - 1)
                hits = indices[self.hashes[indices] == grams]
                names += [self.names[number] for number in self.files[hits]]
        return names

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        about = json.dumps([self.names, self.word_sizes, self.character_sizes])
        np.savez(buffer, hashes=self.hashes, files=self.files, about=np.frombuffer(about.encode(), np.uint8))
        write_bytes_atomic(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "Index":
        with np.load(path) as arrays:
            names, words, characters = json.loads(arrays["about"].tobytes())
            return Index(arrays["hashes"], arrays["files"], tuple(names), tuple(words), tuple(characters))


def eval_files(paths: Iterable[str | Path]) -> list[Path]:
    """Evaluation files of the given files and folders. Raises UserError if there are none."""
    files: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            files += files_below(given, lambda path: path.suffix.lower() in SUFFIXES)
        elif given.is_file():
            files.append(given)
        else:
            raise UserError(f"decontaminate.path is {given}: no such file or folder")
    if not files:
        raise UserError(f"decontaminate.path holds no evaluation file; allowed: {' '.join(SUFFIXES)}")
    return files


def build_index(files: Iterable[Path], words: int, characters: int) -> Index:
    """Hash every text of every record. Raises UserError for a file that cannot be parsed."""
    hashes: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    names: list[str] = []
    sizes: tuple[set[int], set[int]] = (set(), set())
    for path in files:
        for text in _texts(path):
            tokens, by_character = token_hashes(text)
            limit, least = (characters, _MIN_CHARACTERS) if by_character else (words, _MIN_WORDS)
            if len(tokens) >= least:
                sizes[by_character].add(min(limit, len(tokens)))
                grams = np.unique(ngram_hashes(tokens, limit))
                hashes.append(grams)
                owners.append(np.full(len(grams), len(names), np.uint32))
        names.append(path.name)
    flat = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    owner = np.concatenate(owners) if owners else np.zeros(0, np.uint32)
    unique, first = np.unique(flat, return_index=True)
    return Index(unique, owner[first], tuple(names), tuple(sorted(sizes[0])), tuple(sorted(sizes[1])))


def _texts(path: Path) -> Iterator[str]:
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; decontamination cannot read it") from None
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        # A field may be as long as the file.
        csv.field_size_limit(max(csv.field_size_limit(), len(content)))
        for row in csv.reader(io.StringIO(content), delimiter="\t" if suffix == ".tsv" else ","):
            yield from row
    elif suffix == ".txt":
        yield from content.split("\n")
    else:
        records = [content] if suffix == ".json" else [line for line in content.split("\n") if line.strip()]
        for number, record in enumerate(records, 1):
            try:
                yield from _strings(json.loads(record))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: invalid JSON ({error}); decontamination cannot read it") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
