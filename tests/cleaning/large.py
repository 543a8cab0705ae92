"""Clean, de-duplicate and tokenize a corpus of many gigabytes made from real text, and say what larger ones ask for.

    python -m tests.cleaning.large --gigabytes 10 --folder FOLDER --save SAVE [--corpus FILE] [--cores N] [--seconds S]

Run it in a checkout. Documents are made of sentences that are drawn at random from one source of the corpus (default: the
sample that ships), so two documents share next to nothing; every tenth is an exact copy of another, and every tenth a near
copy with a hundredth of its words replaced. FOLDER needs about four times the size on disk and is left as it is; a
temporary folder is used where none is given. Each step runs in a process of its own: its processor time is the system's
count for it and its workers; peak memory is that of the largest process, told of the steps that need more of it for more
documents. --cores confines the run to so many cores and workers. After --seconds the step under way is stopped; the same
command resumes, and its processor time is added to what was spent before.

SAVE gets results.json, written anew after each step, and at the end, with matplotlib, table.md, steps.csv and steps.png;
--chart SAVE/results.json only writes those.
`--memory 250000 1000000` measures only the memory of de-duplication, of random signatures of so many documents.
"""

import argparse
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tests.cleaning.noise import SEED, edit
from tnllm import assets
from tnllm.cleaning.dedup import MATCH_TASKS, Group, Match, shingles
from tnllm.cleaning.executor import run_stages, stage_stats
from tnllm.cleaning.pipeline import open_run
from tnllm.cleaning.records import read_records
from tnllm.cleaning.settings import CleanSettings, DedupSection
from tnllm.data.corpus import find_files
from tnllm.data.remote import read_documents
from tnllm.data.shards import read_manifest
from tnllm.data.tokenize import tokenize_corpus
from tnllm.files import write_text_atomic
from tnllm.progress import log
from tnllm.tokenizer import Tokenizer

_WINDOW = 50_000
_CHUNK_BYTES = 250e6
_FILE_BYTES = 16e6
_TERABYTES = 6
_CORES = (2, 16, 64, 256)
# Steps of one task.
_SINGLE = ("choose", "group")
# Steps that cannot use more workers than this.
_MOST = {"match": MATCH_TASKS, "choose": 1, "group": 1}


def make_chunk(
    pools: dict[str, list[str]], lengths: dict[str, list[int]], folder: Path, size: float, chunk: int
) -> None:
    """Write JSON Lines files of `size` bytes of text in all: text and id. planted-NN.jsonl, written last, lists the copies.

    Of each copy it holds id, of (the original's id) and kind (exact, near); of every 20th near copy also similarity.
    """
    rng = random.Random(SEED + chunk)
    sources, weights = list(pools), list(accumulate(sum(map(len, pool)) for pool in pools.values()))
    recent: list[tuple[str, str]] = []
    lines: list[str] = []
    planted: list[dict[str, Any]] = []
    written = held = number = files = 0
    while written < size:
        name = f"{chunk}-{number}"
        if number % 10 in (8, 9):
            of, text = rng.choice(recent)
            planted.append({"id": name, "of": of, "kind": "near" if number % 10 == 9 else "exact"})
            if number % 10 == 9:
                original, text = text, edit(text, rng)
                # Exact similarity takes longer than all else here.
                if number % 200 == 9:
                    planted[-1]["similarity"] = round(jaccard(original, text), 3)
        else:
            [source] = rng.choices(sources, cum_weights=weights)
            text = "".join(rng.sample(pools[source], min(max(5, rng.choice(lengths[source])), len(pools[source]))))
            if len(recent) < _WINDOW:
                recent.append((name, text))
            else:
                recent[rng.randrange(_WINDOW)] = (name, text)
        lines.append(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
        num_bytes = len(text.encode())
        written, held, number = written + num_bytes, held + num_bytes, number + 1
        if held >= _FILE_BYTES or written >= size:
            write_text_atomic(folder / "input" / f"{chunk:03d}-{files:03d}.jsonl", "".join(lines))
            lines, held, files = [], 0, files + 1
    write_text_atomic(folder / f"planted-{chunk:03d}.jsonl", "".join(json.dumps(record) + "\n" for record in planted))


def make_input(corpus: Path, folder: Path, gigabytes: float, workers: int) -> None:
    """The chunks that are not there yet, by processes that share the corpus's sentences."""
    pools: dict[str, list[str]] = {}
    lengths: dict[str, list[int]] = {}
    for document in read_documents(find_files([corpus])):
        sentences = re.findall(r"[^.!?。！？]+(?:[.!?。！？]+\s*|$)", document.text) or [document.text]
        source = str(document.record.get("source", ""))
        pools.setdefault(source, []).extend(sentences)
        lengths.setdefault(source, []).append(min(len(sentences), 30))
    chunks = math.ceil(gigabytes * 1e9 / _CHUNK_BYTES)
    missing = [chunk for chunk in range(chunks) if not (folder / f"planted-{chunk:03d}.jsonl").exists()]
    (folder / "input").mkdir(parents=True, exist_ok=True)
    work = partial(make_chunk, pools, lengths, folder, gigabytes * 1e9 / chunks)
    # Forked processes get the sentences without a copy.
    with get_context("fork").Pool(min(workers, max(1, len(missing)))) as pool:
        for done, _ in enumerate(pool.imap_unordered(work, missing), 1):
            log(f"made {done} of {len(missing)} chunks")


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts as de-duplication defines it."""
    a, b = (set(shingles(text, DedupSection()).tolist()) for text in (first, second))
    return len(a & b) / len(a | b)


def _measured(work: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(*arguments)
        done = True
    except KeyboardInterrupt:
        done = False
    for child in multiprocessing.active_children():
        child.join()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    # ru_maxrss would count what the process was started from.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    pipe.send((seconds, max(int(peak), usages[1].ru_maxrss) / 2**20, done))


def measured(work: Callable[..., Any], *arguments: Any, until: float = math.inf) -> tuple[float, float, bool]:
    """Processor seconds of `work` in a new process and its workers, that process's own peak memory in GiB, and if it ended.

    At the monotonic time `until` it is stopped as by Ctrl-C. Linux only.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, arguments, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(None if until == math.inf else max(0.0, until - time.monotonic())):
            os.kill(process.pid or 0, signal.SIGINT)
        return ours.recv()
    finally:
        process.join()


def settings_of(folder: Path) -> CleanSettings:
    """The default recipe, and decontamination with the evaluation set of the dirty sample."""
    return CleanSettings.model_validate(
        {"input": {"path": str(folder / "input"), "shard_mb": 16}, "decontaminate": {"path": ["dirty-evaluation"]}}
    )


def run_stage(folder: Path, number: int, workers: int) -> None:
    """One stage of a cleaning run."""
    settings = settings_of(folder)
    stage = open_run(settings, folder / "out").stages[number]
    last = time.monotonic()

    def show(progress: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 20:
            last = time.monotonic()
            log(
                f"{stage.name}: {progress.done} of {progress.tasks} tasks, {progress.num_bytes / 1e6:,.0f} MB of this call"
            )

    run_stages([stage], "local", workers, settings.slurm, show)


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
            seconds, peak = sum(task[0] for task in tasks), max(task[1] for task in tasks)
            more_seconds, group_peak, _ = measured(grouped, Path(temporary))
        each, group_each = ((gib - base) * 2**30 / documents for gib in (peak, group_peak))
        sizes_of = f"{peak:.2f} | {each:.0f} | {group_peak:.2f} | {group_each:.0f}"
        yield f"| {documents:,} | {sizes_of} | {seconds:.0f}, {more_seconds:.0f} |"


def nothing() -> None:
    """For the cost of a process that has only loaded the modules."""


def _names(path: Path) -> set[str]:
    return {record["id"] for record in read_records(path)}


def recall(folder: Path, workers: int) -> dict[str, list[int]]:
    """Kind of copy → how many were dropped as duplicates, of those that, like their originals, passed the filters."""
    with get_context("spawn").Pool(workers) as pool:
        dropped: set[str] = set().union(*pool.imap_unordered(_names, (folder / "out" / "rejected").glob("dedup-*.gz")))
        passed = dropped.union(*pool.imap_unordered(_names, (folder / "out" / "clean").glob("*.gz")))
    counts: dict[str, list[int]] = {}
    for path in sorted(folder.glob("planted-*.jsonl")):
        for record in map(json.loads, path.read_text("utf-8").splitlines()):
            if not {record["id"], record["of"]} <= passed:
                continue
            kind = record["kind"]
            if kind == "near":
                similarity = record.get("similarity")
                known = "not measured" if similarity is None else "from 0.8" if similarity >= 0.8 else "below 0.8"
                kind = f"near, similarity {known}"
            hits, total = counts.get(kind, (0, 0))
            counts[kind] = [hits + (record["id"] in dropped), total + 1]
    return counts


class OutOfTime(Exception):
    """The limit of --seconds was reached; results.json says how far the run is."""


class Run:
    """The steps of a run and what is known of them, kept in results.json and read from it by the next call."""

    def __init__(self, folder: Path, results: Path, gigabytes: float, workers: int, until: float) -> None:
        self.folder, self.results, self.workers, self.until = folder, results, workers, until
        self.state: dict[str, Any] = {"gigabytes": gigabytes, "steps": {}, "clean": {}, "copies": {}, "counts": {}}
        if results.exists():
            self.state = json.loads(results.read_text("utf-8"))
            if self.state["gigabytes"] != gigabytes:
                sys.exit(f"{results} is of {self.state['gigabytes']:g} GB; give another folder or --gigabytes")
        machine = {"machine": platform.machine(), "cores": workers, "python": platform.python_version()}
        self.state |= machine | {"date": str(date.today()), "model": _processor()}

    def save(self) -> None:
        """Write results.json."""
        write_text_atomic(self.results, json.dumps(self.state, indent=1) + "\n")

    def step(self, name: str, megabytes: float, work: Callable[..., Any], *arguments: Any) -> None:
        """Run a step unless it is done; raises OutOfTime."""
        row = self.state["steps"].setdefault(
            name, {"step": name, "megabytes": megabytes, "seconds": 0.0, "wall": 0.0, "gib": 0.0, "done": False}
        )
        if row["done"]:
            return
        start = time.monotonic()
        seconds, peak, done = measured(work, *arguments, until=self.until)
        wall = time.monotonic() - start
        row |= {
            "seconds": row["seconds"] + seconds,
            "wall": row["wall"] + wall,
            "gib": max(row["gib"], peak),
            "done": done,
        }
        row["workers"] = min(self.workers, _MOST.get(name, self.workers))
        log(f"{name}: {seconds:.0f} core seconds, {wall:.0f} s{'' if done else ', not done'}")
        self.save()
        if not done:
            raise OutOfTime

    def all(self, corpus: Path) -> None:
        """Every step, from the input to the recall of the copies."""
        counts, out = self.state["counts"], self.folder / "out"
        if "base" not in counts:
            counts["base"] = measured(nothing)[1]
        megabytes = self.state["gigabytes"] * 1e3
        self.step("make", megabytes, make_input, corpus, self.folder, self.state["gigabytes"], self.workers)
        stages = open_run(settings_of(self.folder), out).stages
        for number, stage in enumerate(stages):
            # Without workers, so that the memory is the process's own.
            workers = 1 if stage.name in _SINGLE else self.workers
            self.step(stage.name, megabytes, run_stage, self.folder, number, workers)
            stats = stage_stats(stage)
            if stage.name == "filter":
                # The text that de-duplication and tokenizing get.
                keys = ("seconds", "bytes", "documents")
                self.state["clean"] = {step: {key: row.get(key, 0) for key in keys} for step, row in stats.items()}
                counts["signed"], counts["documents"] = stats["minhash"]["documents"], stats["read"]["documents"]
                megabytes = stats["write"]["bytes"] / 1e6
            elif stage.name in _SINGLE:
                [row] = stats.values()
                counts |= {key: row[key] for key in ("candidates", "groups") if key in row}
        self.step(
            "tokenize", stats["write"]["bytes"] / 1e6, tokenize, out / "clean", self.folder / "tokens", self.workers
        )
        counts["tokens"] = read_manifest(self.folder / "tokens").total("tokens")
        self.state["copies"] = recall(self.folder, self.workers)
        self.save()


def _processor() -> str:
    """The processor's name (Linux)."""
    [name, *_] = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8")) or ["unknown processor"]
    return name


def days(row: dict[str, Any], size: float, cores: int) -> float:
    """Days that a step of the large corpus takes on so many cores, at the measured processor time."""
    return _TERABYTES * 1e6 / size * row["seconds"] / 86400 / min(cores, _MOST.get(row["step"], cores))


def table(state: dict[str, Any]) -> Iterator[str]:
    """Markdown lines; of a run that is not done, of its done steps."""
    counts, size = state["counts"], state["gigabytes"] * 1e3
    rows = [row for row in state["steps"].values() if row["done"]]
    passed = f"{counts.get('documents', 0):,} documents; {counts.get('signed', 0):,} passed the filters"
    machine = f"{state['model']}, {state['cores']} cores, Python {state['python']}, {state['date']}"
    yield f"{size / 1e3:g} GB, {passed}; {counts.get('tokens', 0):,} tokens. {machine}"
    yield ""
    yield "| step | MB of text in | core seconds | MB/s a core | clock, s | peak memory, GiB | for a million documents |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        peak = each = ""
        # Of few documents the modules' own memory is most.
        if row["step"] in _MOST and counts["signed"] >= 200_000:
            grown = (row["gib"] - counts["base"]) / counts["signed"] * 1e6
            peak, each = f"{row['gib']:.2f}", f"{grown:.2f} GiB"
        speed = row["megabytes"] / row["seconds"]
        figures = f"{row['megabytes']:.0f} | {row['seconds']:.0f} | {speed:.1f} | {row['wall']:.0f} | {peak} | {each}"
        yield f"| {row['step']} | {figures} |"
    yield ""
    yield "| within filter | MB of text in | seconds | MB/s a worker |"
    yield "| --- | --- | --- | --- |"
    for name, row in state["clean"].items():
        if row["seconds"]:
            megabytes = row["bytes"] / 1e6
            yield f"| {name} | {megabytes:.0f} | {row['seconds']:.0f} | {megabytes / row['seconds']:.1f} |"
    yield ""
    yield "| planted copies | dropped | of | recall |"
    yield "| --- | --- | --- | --- |"
    for kind, (hits, total) in sorted(state["copies"].items()):
        yield f"| {kind} | {hits:,} | {total:,} | {hits / total:.2%} |"
    yield ""
    yield f"| {_TERABYTES} TB | core hours | {' | '.join(f'days on {count} cores' for count in _CORES)} |"
    yield "| --- | --- |" + " --- |" * len(_CORES)
    rows = [row for row in rows if row["step"] != "make"]
    for row in rows:
        hours = _TERABYTES * 1e6 / size * row["seconds"] / 3600
        yield f"| {row['step']} | {hours:,.0f} | {' | '.join(f'{days(row, size, count):.2g}' for count in _CORES)} |"
    totals = (f"{sum(days(row, size, count) for row in rows):.2g}" for count in _CORES)
    core_hours = sum(days(row, size, 1) for row in rows) * 24
    yield f"| all, one after another | {core_hours:,.0f} | {' | '.join(totals)} |"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write table.md, steps.csv and steps.png."""
    from matplotlib.figure import Figure

    (folder / "table.md").write_text("\n".join(table(state)) + "\n", "utf-8")
    rows = [row for row in state["steps"].values() if row["done"] and row["step"] != "make"]
    with open(folder / "steps.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds = [row["megabytes"] / row["seconds"] for row in rows]
    bars = left.barh([row["step"] for row in rows], speeds, color="#4269d0")
    left.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    left.invert_yaxis()
    left.set_xscale("log")
    left.margins(x=0.15)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("MB of text per core second")
    cores, size = [2**n for n in range(1, 11)], state["gigabytes"] * 1e3
    right.plot(cores, [sum(days(row, size, count) for row in rows) for count in cores], color="#4269d0", marker="o")
    right.set(xscale="log", yscale="log", xlabel="cores", ylabel=f"days for {_TERABYTES} TB")
    right.set_xticks(cores[::2], [str(count) for count in cores[::2]])
    right.minorticks_off()
    right.yaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "steps.png", dpi=160)


def main() -> None:
    """Make the input, run, print."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, default=assets.named("sample"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cores", "--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--chart", type=Path, help="only write the table and the chart of this results.json")
    parser.add_argument("--memory", type=int, nargs="+", metavar="DOCUMENTS", help="only this, of random signatures")
    given = parser.parse_args()
    if given.chart:
        save(given.save or given.chart.parent, json.loads(given.chart.read_text("utf-8")))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        results = given.save or folder
        for path in (folder, results):
            path.mkdir(parents=True, exist_ok=True)
        if given.memory:
            for line in memory(folder, given.memory):
                print(line, flush=True)
            return
        run = Run(folder, results / "results.json", given.gigabytes, given.cores, start + given.seconds)
        try:
            run.all(given.corpus)
        except OutOfTime:
            log("stopped by --seconds; the same command resumes")
        print("\n".join(table(run.state)))
        if given.save and run.state["copies"] and importlib.util.find_spec("matplotlib"):
            save(given.save, run.state)


if __name__ == "__main__":
    main()
