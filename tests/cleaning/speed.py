"""The speed of each step of clean, dedup and tokenize on one core, in processor seconds, so that a busy machine may run it.

    python -m tests.cleaning.speed CORPUS [MB] [FOLDER]      # CORPUS: JSON Lines with fields text and source

Run it in a checkout. The input is made of the corpus's documents in random order, about MB megabytes of text (default 50):
every tenth document is an exact copy of an earlier one and every tenth a near copy. FOLDER (default: a temporary one) gets
it and what the steps write.
"""

import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from datatrove.data import Document

from tests.cleaning.noise import SEED, edit
from tnllm import assets
from tnllm.cleaning.pipeline import open_run
from tnllm.cleaning.records import read_folder
from tnllm.cleaning.settings import CleanSettings
from tnllm.cleaning.steps import Step, Writer
from tnllm.data.corpus import find_files
from tnllm.data.encode import Options, _encode
from tnllm.data.remote import read_documents
from tnllm.tokenizer import Tokenizer

_CHUNK = 2000


def make_input(corpus: Path, path: Path, megabytes: float) -> None:
    """Write the input: documents of the corpus, a tenth exact and a tenth near copies."""
    rng = random.Random(SEED)
    texts = [(str(d.record.get("source", "")), d.text) for d in read_documents(find_files([corpus]))]
    rng.shuffle(texts)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for number, (source, text) in enumerate(texts):
            if number % 10 in (8, 9):
                text = texts[rng.randrange(number)][1]
                text = edit(text, rng) if number % 10 == 9 else text
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return


class Clock:
    """Adds up processor seconds and bytes of text by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def run(self, name: str, work: Callable[[], Any], num_bytes: int) -> Any:
        start = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        self.bytes[name] = self.bytes.get(name, 0) + num_bytes
        return result

    def show(self) -> None:
        for name, spent in self.seconds.items():
            print(f"| {name} | {self.bytes[name] / 1e6:.1f} | {spent:.1f} | {self.bytes[name] / 1e6 / spent:.1f} |")


def size_of(docs: Iterable[Any]) -> int:
    """UTF-8 bytes of the texts."""
    return sum(len(doc.text.encode()) for doc in docs)


def clean_steps(clock: Clock, run: Any) -> None:
    """Every step of the filter stage, a chunk of documents at a time, then the stages of de-duplication."""
    filters, *dedup = run.stages
    reader, *steps = filters.steps
    source: Iterator[Document] = reader.run(None, 0, 1)
    sinks = {step.name: [] for step in steps if not isinstance(step, Step)}
    while True:
        docs: list[Document] = clock.run("clean: read", lambda: list(islice(source, _CHUNK)), 0)
        if not docs:
            break
        clock.bytes["clean: read"] += size_of(docs)
        for step in steps:
            if isinstance(step, Step):
                docs = [doc for doc in docs if "rejected" not in doc.metadata]
                clock.run(
                    f"clean: {step.name}", lambda step=step, docs=docs: [step.process(d) for d in docs], size_of(docs)
                )
        docs = [doc for doc in docs if "rejected" not in doc.metadata]
        for name in sinks:
            sinks[name] += docs
    for step in steps:
        if step.name in sinks:
            docs = sinks[step.name]
            name = "clean: write" if isinstance(step, Writer) else "dedup: sign"
            clock.run(name, lambda step=step, docs=docs: list(step.run(iter(docs), 0, 1)), size_of(docs))
    total = size_of(docs)
    for stage in dedup:
        *first, last = stage.steps

        def work(stage: Any = stage, first: Any = first, last: Any = last) -> None:
            for rank in range(stage.tasks):
                data = None
                for step in (*first, last):
                    data = step.run(data, rank, stage.tasks)
                list(data)

        name = {"match": "dedup: match", "group": "dedup: verify and group", "dedup": "dedup: drop and write"}[
            stage.name
        ]
        clock.run(name, work, total)


def _process(step: Step, docs: list[Document]) -> None:
    for doc in docs:
        step.process(doc)


def main(corpus: Path, megabytes: float, folder: Path) -> None:
    """Make the input, time the steps, print a table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "input.jsonl"
    make_input(corpus, path, megabytes)
    settings = CleanSettings.model_validate(
        {"input": {"path": str(path), "shard_mb": 1e6}, "decontaminate": {"path": ["dirty-evaluation"]}}
    )
    clock = Clock()
    clean_steps(clock, open_run(settings, folder / "out"))
    tokenizer = Tokenizer.load(assets.tokenizer_model("tnllm-64k"))
    texts = [record["text"] for record in read_folder(folder / "out" / "clean")]
    read = clock.run("tokenize: read", lambda: sum(1 for _ in read_documents([path])), path.stat().st_size)
    num_bytes = sum(len(text.encode()) for text in texts)
    clock.run("tokenize: encode", lambda: _encode(texts, True, tokenizer, Options()), num_bytes)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {date.today()}")
    print(f"{read:,} documents in, {len(texts):,} unique after the filters; peak memory "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB\n")  # fmt: skip
    print("| step | MB of text in | processor s | MB/s a core |\n| --- | --- | --- | --- |")
    clock.show()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(temporary)
        main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 50.0, where)
