"""Clean, de-duplicate and tokenize a corpus of many gigabytes made from real text, and say what larger ones ask for.

    python -m tests.cleaning.large --gigabytes 10 [--corpus FILE] [--folder DIR] [--workers 2] [--save DIR]

Run it in a checkout. Documents are made of sentences that are drawn at random from one source of the corpus (default: the
sample that ships), so two documents share next to nothing; every tenth is an exact copy of one of 50,000 others, and every
tenth a near copy with a hundredth of its words replaced. DIR needs about three times the size on disk and is left as it is
afterwards; a temporary folder is used where none is given. Each stage runs in a process of its own: its processor time is
the system's count for it and its workers, its peak memory that of matching and grouping, which alone need more of it for
more documents. `--memory 250000 1000000` measures only that, of random signatures of so many documents. --save writes
table.md, steps.csv and steps.png.
"""

import argparse
import csv
import json
import multiprocessing
import platform
import random
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tests.cleaning.noise import SEED, edit
from tnllm import assets
from tnllm.cleaning.dedup import MATCH_TASKS, Group, Match, shingles
from tnllm.cleaning.executor import run_stages
from tnllm.cleaning.pipeline import open_run
from tnllm.cleaning.records import read_folder
from tnllm.cleaning.settings import CleanSettings, DedupSection
from tnllm.data.corpus import find_files
from tnllm.data.remote import read_documents
from tnllm.data.shards import read_manifest
from tnllm.data.tokenize import tokenize_corpus
from tnllm.progress import log
from tnllm.tokenizer import Tokenizer

_WINDOW = 50_000
_TERABYTES = 6
_CORES = (16, 64, 256)


def make_input(corpus: Path, path: Path, gigabytes: float) -> None:
    """Write JSON Lines: text, id, kind (new, exact, near), of (the original's id); of every 20th near copy similarity."""
    rng = random.Random(SEED)
    pools: dict[str, list[str]] = {}
    lengths: dict[str, list[int]] = {}
    for document in read_documents(find_files([corpus])):
        sentences = re.findall(r"[^.!?。！？]+[.!?。！？]+\s*", document.text) or [document.text]
        source = str(document.record.get("source", ""))
        pools.setdefault(source, []).extend(sentences)
        lengths.setdefault(source, []).append(min(len(sentences), 30))
    sources, weights = list(pools), list(accumulate(sum(map(len, pool)) for pool in pools.values()))
    recent: list[tuple[int, str]] = []
    size = number = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < gigabytes * 1e9:
            record: dict[str, Any] = {"id": str(number), "kind": "new"}
            if number % 10 in (8, 9):
                of, text = rng.choice(recent)
                record |= {"kind": "near" if number % 10 == 9 else "exact", "of": str(of)}
                if record["kind"] == "near":
                    original, text = text, edit(text, rng)
                    # Exact similarity takes longer than all else here.
                    if number % 200 == 9:
                        record["similarity"] = round(jaccard(original, text), 3)
            else:
                [source] = rng.choices(sources, cum_weights=weights)
                text = "".join(rng.sample(pools[source], min(max(5, rng.choice(lengths[source])), len(pools[source]))))
                if len(recent) < _WINDOW:
                    recent.append((number, text))
                else:
                    recent[rng.randrange(_WINDOW)] = (number, text)
            file.write(json.dumps(record | {"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            number += 1


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts as de-duplication defines it."""
    a, b = (set(shingles(text, DedupSection()).tolist()) for text in (first, second))
    return len(a & b) / len(a | b)


def _measured(work: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any) -> None:
    work(*arguments)
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    # ru_maxrss would count what the process was started from.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    pipe.send((seconds, int(peak) / 2**20))


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Processor seconds of `work` in a new process and its workers, and that process's own peak memory in GiB (Linux)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, arguments, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def run_stage(settings: CleanSettings, out: Path, number: int, workers: int) -> None:
    """One stage of a cleaning run."""
    stage = open_run(settings, out).stages[number]
    run_stages([stage], "local", workers, settings.slurm, lambda progress: None)


def tokenize(folder: Path, out: Path, workers: int) -> None:
    """All of a folder with the large tokenizer."""
    tokenizer = Tokenizer.load(assets.tokenizer_model("tnllm-64k"))
    tokenize_corpus(find_files([folder]), out, tokenizer, workers=workers)


def make_signatures(folder: Path, documents: int) -> None:
    """Signatures of documents that share nothing, a fifth of them written twice, in files of 50,000."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, documents, _WINDOW)):
        count = min(_WINDOW, documents - first)
        values = rng.integers(0, 1 << 32, (DedupSection().num_hashes, count), np.uint32)
        exact = rng.integers(0, 1 << 62, count).astype(np.uint64)
        copies = count // 5
        values[:, count - copies :], exact[count - copies :] = values[:, :copies], exact[:copies]
        np.save(folder / f"{number:05d}.npy", values)
        np.save(folder / f"{number:05d}.exact.npy", exact)


def matched(folder: Path, task: int) -> None:
    """One task of matching."""
    Match(folder / "signatures", folder / "pairs", DedupSection(memory_mb=1e6)).run(None, task, MATCH_TASKS)


def grouped(folder: Path) -> None:
    """Grouping by the estimate of the signatures: of no texts there is none to verify by."""
    settings = DedupSection(verify="estimate")
    Group(folder / "signatures", folder / "pairs", folder, folder / "groups.npz", settings).run()


def memory(folder: Path, sizes: list[int]) -> Iterator[str]:
    """Markdown: peak memory and time of matching and grouping by the number of documents, without a limit of memory."""
    base = measured(nothing)[1]
    yield "| documents | matching, GiB | bytes a document | grouping, GiB | bytes a document | core seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for documents in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            make_signatures(Path(temporary) / "signatures", documents)
            tasks = [measured(matched, Path(temporary), task) for task in range(MATCH_TASKS)]
            seconds, peak = sum(spent for spent, _ in tasks), max(gib for _, gib in tasks)
            more_seconds, group_peak = measured(grouped, Path(temporary))
        each, group_each = ((gib - base) * 2**30 / documents for gib in (peak, group_peak))
        sizes_of = f"{peak:.2f} | {each:.0f} | {group_peak:.2f} | {group_each:.0f}"
        yield f"| {documents:,} | {sizes_of} | {seconds:.0f}, {more_seconds:.0f} |"


def nothing() -> None:
    """For the cost of a process that has only loaded the modules."""


def recall(source: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Kind of copy → how many were dropped as duplicates, of those that, like their originals, passed the filters."""
    dropped = {r["id"] for r in read_folder(out / "rejected", "dedup")}
    passed = dropped | {record["id"] for record in read_folder(out / "clean")}
    counts: dict[str, tuple[int, int]] = {}
    with open(source, encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["kind"] == "new" or not {record["id"], record["of"]} <= passed:
                continue
            kind = record["kind"]
            if kind == "near":
                measured = record.get("similarity")
                kind = f"near, {'not measured' if measured is None else 'from 0.8' if measured >= 0.8 else 'below 0.8'}"
            hits, total = counts.get(kind, (0, 0))
            counts[kind] = (hits + (record["id"] in dropped), total + 1)
    return counts


Row = dict[str, Any]


def run(folder: Path, megabytes: float, workers: int) -> tuple[list[Row], dict[str, Any], dict[str, tuple[int, int]]]:
    """The stages' rows, the cleaning report's counts, and the recall of the copies."""
    out = folder / "out"
    settings = CleanSettings.model_validate({"input": {"path": str(folder / "input.jsonl"), "shard_mb": 16}})
    base = measured(nothing)[1]
    rows: list[Row] = []
    stages = [stage.name for stage in open_run(settings, out).stages]
    for number, name in enumerate(stages):
        rows.append(Row(step=name, megabytes=megabytes, seconds=0.0, gib=0.0))
        # Without workers, so that the memory is the process's own.
        alone = 1 if name in ("match", "group") else workers
        rows[-1]["seconds"], rows[-1]["gib"] = measured(run_stage, settings, out, number, alone)
        log(f"{name}: {rows[-1]['seconds']:.0f} core seconds")
    stats = open_run(settings, out).stats()
    counts = {
        "documents": sum(1 for _ in open(folder / "input.jsonl", "rb")),
        "candidates": 0,
        "groups": 0,
        "base": base,
    }
    counts |= {name: stats["group"]["group"].get(name, 0) for name in ("candidates", "groups")}
    counts["signed"] = stats["filter"]["minhash"].get("documents", 0)
    cleaned = sum(len(record["text"].encode()) for record in read_folder(out / "clean")) / 1e6
    rows.append(Row(step="tokenize", megabytes=cleaned, seconds=0.0, gib=0.0))
    rows[-1]["seconds"], rows[-1]["gib"] = measured(tokenize, out / "clean", folder / "tokens", workers)
    counts["tokens"] = read_manifest(folder / "tokens").total("tokens")
    return rows, counts, recall(folder / "input.jsonl", out)


def table(rows: list[Row], counts: dict[str, Any], copies: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Markdown lines."""
    size = rows[0]["megabytes"]
    yield f"{size / 1e3:.2f} GB, {counts['documents']:,} documents; {counts['signed']:,} passed the filters; " + (
        f"{counts['tokens']:,} tokens. {platform.machine()}, Python {platform.python_version()}, {date.today()}"
    )
    yield ""
    yield "| step | MB | core seconds | MB/s a core | peak memory, GiB | of it for a million documents |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        peak = each = ""
        # Of few documents the modules' own memory is most.
        if row["step"] in ("match", "group") and counts["signed"] >= 200_000:
            grown = (row["gib"] - counts["base"]) / counts["signed"] * 1e6
            peak, each = f"{row['gib']:.2f}", f"{grown:.2f} GiB"
        speed = row["megabytes"] / row["seconds"]
        yield f"| {row['step']} | {row['megabytes']:.0f} | {row['seconds']:.0f} | {speed:.1f} | {peak} | {each} |"
    yield ""
    yield "| planted copies | dropped | of | recall |"
    yield "| --- | --- | --- | --- |"
    for kind, (hits, total) in sorted(copies.items()):
        yield f"| {kind} | {hits:,} | {total:,} | {hits / total:.2%} |"
    yield ""
    cores = " | ".join(f"days on {count} cores" for count in _CORES)
    yield f"| {_TERABYTES} TB | core hours | {cores} |"
    yield "| --- | --- |" + " --- |" * len(_CORES)
    for row in rows:
        hours = _TERABYTES * 1e6 / size * row["seconds"] / 3600
        # Matching has at most eight tasks, grouping one.
        most = {"match": MATCH_TASKS, "group": 1}.get(row["step"], max(_CORES))
        days = " | ".join(f"{hours / 24 / min(count, most):.2g}" for count in _CORES)
        yield f"| {row['step']} | {hours:,.0f} | {days} |"


def save(folder: Path, text: str, rows: list[Row]) -> None:
    """Write table.md, steps.csv and steps.png."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text, "utf-8")
    with open(folder / "steps.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        [row["step"] for row in rows], [row["megabytes"] / row["seconds"] for row in rows], color="#4269d0"
    )
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("MB of text per core second")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "steps.png", dpi=160)


def main() -> None:
    """Make the input, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, default=assets.named("sample"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--memory", type=int, nargs="+", metavar="DOCUMENTS", help="only this, of random signatures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.memory:
            for line in memory(folder, given.memory):
                print(line, flush=True)
            return
        source = folder / "input.jsonl"
        log(f"making {given.gigabytes:g} GB of text in {folder}")
        make_input(given.corpus, source, given.gigabytes)
        rows, counts, copies = run(folder, given.gigabytes * 1e3, given.workers)
        text = "\n".join(table(rows, counts, copies)) + "\n"
        print(text)
        if given.save:
            save(given.save, text, rows)


if __name__ == "__main__":
    main()
