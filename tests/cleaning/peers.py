"""datatrove's own filters and MinHash beside ours, on the same English documents in one run, by processor time of one core.

    pip install spacy                                       # datatrove splits English words with it; no model is needed
    python -m tests.cleaning.peers CORPUS [MB] [--save FILE.csv]     # default: 20 MB of text

Run it in a checkout. The input is that of tests/cleaning/speed.py, its English documents only. Rows of one kind do the
same work by their own means: rules (Gopher's quality and repetition, C4, FineWeb), personal data, encodings, MinHash. They
take turns, 32 documents each (MinHash: all), so that other work on the machine slows them alike.
"""

import argparse
import csv
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

from tests.cleaning.noise import counts_characters
from tests.cleaning.speed import make_input, size_of
from tnllm.cleaning.dedup import Choose, Drop, Group, Match, Shingle, Sign, num_bands
from tnllm.cleaning.settings import CleanSettings
from tnllm.cleaning.steps import Personal, Repair, Rules, Writer
from tnllm.data.remote import read_documents

Rows = list[dict[str, Any]]
Work = Callable[[list[Document]], int]
_BLOCK = 32


def read(corpus: Path, megabytes: float, folder: Path) -> list[Document]:
    """English documents, with copies."""
    path = folder / "input.jsonl"
    make_input(corpus, path, megabytes * 2)
    docs, size = [], 0
    for number, document in enumerate(read_documents([path])):
        if size < megabytes * 1e6 and not counts_characters(document.text):
            docs.append(Document(document.text, str(number), metadata={"language": "en", "source": ""}))
            size += len(document.text.encode())
    return docs


def timed(rows: Rows, kind: str, works: Mapping[str, Work], docs: list[Document], block: int = _BLOCK) -> None:
    """Add a row for each of `works`, in turn on copies of `block` documents; a work returns how many are left."""
    seconds, kept = dict.fromkeys(works, 0.0), dict.fromkeys(works, 0)
    for number, begin in enumerate(range(0, len(docs), block)):
        # Each of them is first as often as last.
        for name in list(works)[:: -1 if number % 2 else 1]:
            own = deepcopy(docs[begin : begin + block])
            start = time.process_time()
            kept[name] += works[name](own)
            seconds[name] += time.process_time() - start
    megabytes = size_of(docs) / 1e6
    for name, spent in seconds.items():
        row = {"kind": kind, "step": name, "seconds": round(spent, 1), "mb_per_s": round(megabytes / spent, 2)}
        rows.append(row | {"kept": kept[name]})


def theirs(*steps: Any) -> Work:
    """datatrove's steps one after the other."""

    def work(docs: list[Document]) -> int:
        data: Any = iter(docs)
        for step in steps:
            data = step.run(data, 0, 1)
        return sum(1 for _ in data)

    return work


def ours(step: Any) -> Work:
    """One of our steps."""

    def work(docs: list[Document]) -> int:
        for doc in docs:
            step.process(doc)
        return sum("rejected" not in doc.metadata for doc in docs)

    return work


def their_minhash(folder: Path) -> Work:
    """All four steps, as one task each."""

    def work(docs: list[Document]) -> int:
        again = deepcopy(docs)
        sign = MinhashDedupSignature(str(folder / "a"))
        # Its own function gives text to xxhash, of which newer versions take bytes only.
        sign._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
        sign.run(iter(docs), 0, 1)
        buckets = MinhashDedupBuckets(str(folder / "a"), str(folder / "b"))
        for rank in range(14):
            buckets.run(None, rank, 14)
        MinhashDedupCluster(str(folder / "b"), str(folder / "c")).run(None, 0, 1)
        return sum(1 for _ in MinhashDedupFilter(str(folder / "c")).run(iter(again), 0, 1))

    return work


def our_minhash(folder: Path, settings: CleanSettings) -> Work:
    """Sign, match, verify and group, drop; with the reading and writing of the documents between the stages."""
    chosen = settings.dedup
    signatures, pairs, kept, groups = (folder / name for name in ("signatures", "pairs", "filtered", "groups.npz"))
    shingles = folder / "shingles"

    def work(docs: list[Document]) -> int:
        list(Writer(kept, None, "filter").run(Sign(signatures, chosen).run(iter(docs), 0, 1), 0, 1))
        for rank in range(num_bands(chosen) + 1):
            list(Match(signatures, pairs, chosen).run(None, rank, num_bands(chosen) + 1))
        Choose(signatures, pairs, shingles, chosen).run()
        Shingle(kept, shingles, chosen).run()
        Group(signatures, pairs, shingles, groups, chosen).run()
        rows = Drop(settings, kept, groups, signatures).run(None, 0, 1)
        return sum("rejected" not in doc.metadata for doc in rows)

    return work


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("megabytes", type=float, nargs="?", default=20.0)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    rows: Rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        docs = read(given.corpus, given.megabytes, folder)
        settings = CleanSettings()
        warm = deepcopy(docs[:20])  # loads word lists and models
        for step in (GopherQualityFilter(), Rules(settings), Repair(settings), Personal(settings)):
            (ours if hasattr(step, "settings") else theirs)(step)(deepcopy(warm))
        filters = (GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), FineWebQualityFilter())
        rules = {f"datatrove: {type(filter).__name__}": theirs(filter) for filter in filters}
        timed(rows, "rules", {"tnllm: rules (all four sets)": ours(Rules(settings))} | rules, docs)
        personal = {"tnllm: personal": ours(Personal(settings)), "datatrove: PIIFormatter": theirs(PIIFormatter())}
        timed(rows, "personal", personal, docs)
        repair = {"tnllm: repair (also HTML, URLs, characters)": ours(Repair(settings))}
        timed(rows, "encodings", repair | {"datatrove: FTFYFormatter": theirs(FTFYFormatter())}, docs)
        minhash = {
            "tnllm: MinHash, 256 values, pairs verified": our_minhash(folder, settings),
            "datatrove: MinHash, 112 values, pairs not verified": their_minhash(folder / "theirs"),
        }
        # Copies are found among all documents.
        timed(rows, "dedup", minhash, docs, len(docs))
    names = ("datatrove", "spacy", "ftfy", "rensa", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{len(docs):,} documents, {size_of(docs) / 1e6:.1f} MB; {platform.machine()}, Python "
          f"{platform.python_version()}, {versions}, {date.today()}\n")  # fmt: skip
    print("| step | core seconds | MB/s a core | documents left |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['step']} | {row['seconds']} | {row['mb_per_s']} | {row['kept']:,} |")
    if given.save:
        with open(given.save, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
