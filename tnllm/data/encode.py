"""Documents in groups, encoded to token ids by worker processes; `tokenize.py` writes the result.

groups = read_groups(files, manifest, options, on_error="stop")
for group, encoded in encode_groups(groups, tokenizer, options, workers=4):
    encoded.tokens, group.position         # in corpus order for any number of workers
"""

import hashlib
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Literal

import numpy as np

from tnllm.data.corpus import SplitOn
from tnllm.data.documents import BadDocument, LeftOut
from tnllm.data.remote import RemoteFile, read_documents
from tnllm.data.shards import Manifest, token_dtype
from tnllm.tokenizer import Tokenizer

OnError = Literal["stop", "skip"]
_GROUP_CHARS = 1 << 20


@dataclass(frozen=True)
class Options:
    """The choices that decide the tokens. A document is its tokens and the end token; `bos` puts the begin token first.

    `val_fraction` of the documents, chosen by a hash of their text, form the split "val", so equal documents are in the
    same split. If the hash chooses none, the end of the last document is held out instead.
    """

    field: str = "text"
    split_on: SplitOn = "none"
    val_fraction: float = 0.01
    bos: bool = False


@dataclass(frozen=True)
class Group:
    """Documents that one worker encodes at a time, and the reading position after the last of them."""

    texts: list[str]
    position: tuple[int, int]
    skipped: dict[str, int]
    done_bytes: int
    holds_first: bool


@dataclass(frozen=True)
class Encoded:
    """The concatenated tokens of a group's documents; `lengths`, `text_bytes` and `is_val` are per document."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: list[int]
    is_val: list[bool]


def read_groups(
    files: Sequence[Path | RemoteFile],
    manifest: Manifest,
    options: Options,
    on_error: OnError,
    advice: str = "fix it",
    folder: Path | None = None,
) -> Generator[Group, None, None]:
    """Documents in groups, starting at the manifest's position; empty and unreadable ones are left out and counted.

    Remote files are fetched into `folder`, one at a time.
    """
    first_file, to_skip = manifest.position
    skipped = dict(manifest.skipped)
    left_out = LeftOut(skipped["bad"])
    at_start = manifest.position == (0, 0)
    seen = 0

    def on_bad(bad: BadDocument) -> None:
        if seen >= to_skip:
            left_out(bad)
            skipped["bad"] = left_out.count

    base = sum(file["bytes"] for file in manifest.inputs[:first_file])
    texts: list[str] = []
    size = 0
    for number in range(first_file, len(files)):
        seen = position = 0
        reading = (options.field, options.split_on, on_bad if on_error == "skip" else None)
        for document in read_documents([files[number]], *reading, more=(), advice=advice, folder=folder):
            seen, position = seen + 1, document.position
            if seen <= to_skip:
                continue
            if not document.text.strip():
                skipped["empty"] += 1
                continue
            texts.append(document.text)
            size += len(document.text)
            if size >= _GROUP_CHARS:
                yield Group(texts, (number, seen), dict(skipped), base + position, at_start)
                texts, size, at_start = [], 0, False
        base += manifest.inputs[number]["bytes"]
        if texts and isinstance(files[number], RemoteFile):
            # The next transfer may fail or be stopped; what was read here is then kept.
            yield Group(texts, (number + 1, 0), dict(skipped), base, at_start)
            texts, size, at_start = [], 0, False
        to_skip = 0
    yield Group(texts, (len(files), 0), dict(skipped), base, at_start)


_worker: tuple[Tokenizer, Options]


@contextmanager
def ctrl_c_is_ours() -> Iterator[None]:
    """Processes that are spawned in this block never see Ctrl-C, which reaches every process of the terminal.

    A handler of their own would come too late for the seconds in which they import.
    """
    # Starting its own process, it would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(path: Path, options: Options) -> None:
    global _worker
    _worker = (Tokenizer.load(path), options)


def _encode_in_worker(texts: list[str], holds_first: bool) -> Encoded:
    return _encode(texts, holds_first, *_worker)


def _encode(texts: list[str], holds_first: bool, tokenizer: Tokenizer, options: Options) -> Encoded:
    dtype = token_dtype(tokenizer.vocab_size)
    begin, end = np.array([tokenizer.bos_id] * options.bos, dtype), np.array([tokenizer.eos_id], dtype)
    # A list of a long text's ids would take 18 times the memory of an array.
    ids = [
        np.concatenate([begin, *(np.array(tokenizer.encode(part), dtype) for part in tokenizer.parts(text)), end])
        for text in texts
    ]
    data = [text.encode() for text in texts]
    limit = int(options.val_fraction * 2**64)
    is_val = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < limit for text in data]
    if holds_first and texts:
        # The corpus's first document is always trained on, so that a small corpus is never held out completely.
        is_val[0] = False
    tokens = np.concatenate(ids) if ids else np.zeros(0, dtype)
    return Encoded(tokens, [len(part) for part in ids], [len(text) for text in data], is_val)


def encode_groups(
    groups: Iterator[Group], tokenizer: Tokenizer, options: Options, workers: int
) -> Generator[tuple[Group, Encoded], None, None]:
    """Every group with its tokens, in order, for any number of workers."""
    if workers == 1:
        for group in groups:
            yield group, _encode(group.texts, group.holds_first, tokenizer, options)
        return
    pending: deque[tuple[Group, Future[Encoded]]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer.path, options)) as pool:
        try:
            for group in groups:
                with ctrl_c_is_ours():
                    pending.append((group, pool.submit(_encode_in_worker, group.texts, group.holds_first)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
