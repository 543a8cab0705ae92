"""What a corpus or a folder of token shards holds, as plain values that `tnllm data inspect` prints.

inspect_corpus(find_sources(["web.jsonl"]))      # documents, bytes, letters by script, unreadable records
inspect_shards(Path("web-tokens"), num_samples=2)
compression(tokenizer, find_sources(["web.jsonl"]))   # bytes per token
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnllm.data.compressed import stored_size
from tnllm.data.documents import BadDocument
from tnllm.data.remote import RemoteFile, read_documents
from tnllm.data.shards import SPLITS, TokenStream, read_manifest, verify_hashes
from tnllm.errors import UserError
from tnllm.progress import Report
from tnllm.tokenizer import FILE_NAME, Tokenizer

# Scripts can be told apart without a language model.
_SCRIPTS = {
    "han": re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"),
    "kana": re.compile("[\u3040-\u30ff]+"),
    "hangul": re.compile("[\uac00-\ud7af]+"),
    "cyrillic": re.compile("[\u0400-\u04ff]+"),
    "arabic": re.compile("[\u0600-\u06ff]+"),
    "latin": re.compile("[A-Za-z\u00c0-\u024f]+"),
}
_EXCERPT_CHARS = 200
_MAX_BAD = 10


def inspect_corpus(
    files: Sequence[Path | RemoteFile], field: str = "text", report: Report = lambda status: None, num_samples: int = 2
) -> dict[str, Any]:
    """Counts over every document; unreadable records are counted and the first ten are named."""
    bad: list[str] = []
    num_bad = 0

    def on_bad(record: BadDocument) -> None:
        nonlocal num_bad
        num_bad += 1
        if len(bad) < _MAX_BAD:
            bad.append(str(record))

    lengths: list[int] = []
    scripts = dict.fromkeys(_SCRIPTS, 0)
    samples: list[str] = []
    text_bytes = empty = 0
    for document in read_documents(files, field, on_bad=on_bad, report=report, more=()):
        text = document.text
        lengths.append(len(text))
        text_bytes += len(text.encode())
        empty += not text.strip()
        for name, pattern in _SCRIPTS.items():
            # Runs, one at a time: a list of a long text's letters would take many times its memory.
            scripts[name] += sum(run.end() - run.start() for run in pattern.finditer(text))
        if len(samples) < num_samples:
            samples.append(text[:_EXCERPT_CHARS])
    return {
        "kind": "corpus",
        "files": len(files),
        "stored_bytes": sum(stored_size(file) if isinstance(file, Path) else file.size for file in files),
        "documents": len(lengths),
        "empty_documents": empty,
        "bad_documents": num_bad,
        "bad": bad,
        "text_bytes": text_bytes,
        "characters": sum(lengths),
        "longest_document_characters": max(lengths, default=0),
        "letters_by_script": {name: count for name, count in scripts.items() if count},
        "samples": samples,
    }


def inspect_shards(folder: Path, num_samples: int = 2, verify: bool = False) -> dict[str, Any]:
    """Counts of each split and the start of some documents. Raises RunError for a damaged shard."""
    manifest = read_manifest(folder)
    streams = {split: TokenStream(folder, split, manifest) for split in SPLITS}
    if verify:
        verify_hashes(folder, manifest)
    tokenizer = Tokenizer.load(folder / FILE_NAME)
    train = streams["train"]
    count = min(num_samples, train.num_documents)
    numbers = [train.num_documents * number // count for number in range(count)]
    return {
        "kind": "token shards",
        "complete": manifest.complete,
        "created_by": manifest.created_by,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "dtype": np.dtype(manifest.dtype).name,
        "options": manifest.options,
        "inputs": len(manifest.inputs),
        "shards": len(manifest.shards),
        "splits": {
            split: {
                "documents": stream.num_documents,
                "tokens": stream.num_tokens,
                "text_bytes": stream.text_bytes,
                "bytes_per_token": round(stream.text_bytes / stream.num_tokens, 3) if stream.num_tokens else None,
            }
            for split, stream in streams.items()
        },
        "skipped": manifest.skipped,
        "hashes": "all match" if verify else "not checked",
        "samples": [tokenizer.decode(train.document(number)[:100].tolist()) for number in numbers],
    }


def compression(tokenizer: Tokenizer, files: Sequence[Path | RemoteFile], field: str = "text") -> dict[str, Any]:
    """Bytes and characters per token over a corpus, and the speed of encoding it in one process."""
    num_bytes = num_chars = num_tokens = 0
    elapsed_s = 0.0
    for document in read_documents(files, field, more=()):
        start = time.perf_counter()
        num_tokens += len(tokenizer.encode(document.text))
        elapsed_s += time.perf_counter() - start
        num_bytes += len(document.text.encode())
        num_chars += len(document.text)
    if not num_tokens:
        raise UserError(f"{', '.join(map(str, files[:3]))}: no text to count tokens of")
    return {
        "text_bytes": num_bytes,
        "num_tokens": num_tokens,
        "bytes_per_token": round(num_bytes / num_tokens, 3),
        "chars_per_token": round(num_chars / num_tokens, 3),
        "encode_mb_per_s": round(num_bytes / 1e6 / elapsed_s, 2),
    }
