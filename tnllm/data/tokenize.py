"""From a corpus to token shards: in parallel, in corpus order, resumable.

tokenize_corpus(find_files(["corpus/"]), Path("corpus-tokens"), tokenizer, Options(val_fraction=0.01))
folder = prepare("corpus.jsonl.zst", tokenizer)     # raw text is tokenized once into a cache and reused

The shards do not depend on the number of workers. Shards and manifest are replaced atomically, so after a stop or a kill
at any point the same call resumes after the last shard. Workers are started by `spawn`, so a script that calls this
needs the usual `if __name__ == "__main__"`.
"""

import errno
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tnllm import assets
from tnllm.data import shards
from tnllm.data.compressed import stored_size
from tnllm.data.corpus import find_files
from tnllm.data.encode import Encoded, Group, OnError, Options, encode_groups, read_groups
from tnllm.data.folders import refuse_replacing
from tnllm.data.remote import RemoteFile, find_sources, is_remote, local_files, local_path
from tnllm.data.shards import Manifest, Shard
from tnllm.errors import RunError, UserError
from tnllm.files import LOCK, check_output_folder, only_writer, sha256_file, write_bytes_atomic
from tnllm.progress import Report, Status, log
from tnllm.tokenizer import FILE_NAME, Tokenizer

SAMPLE = "sample"
SHARD_TOKENS = 100_000_000
_ADVICE = "fix it, or leave such documents out with --on-error skip"
_OUTER_ADVICE = "fix it, or leave such documents out with tnllm data tokenize --on-error skip and read its shards"
_BYTES_PER_WORKER = 8 << 20


def tokenize_corpus(
    files: Sequence[Path | RemoteFile],
    out: Path,
    tokenizer: Tokenizer,
    options: Options | None = None,
    *,
    on_error: OnError = "stop",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    report: Report = lambda status: None,
    fresh: Manifest | None = None,
    outer_command: bool = False,
) -> Manifest:
    """Write the shards of `files` (of `find_sources`) to `out`, or resume what is there; returns the finished manifest.

    `workers` None chooses by cores and corpus size. With `on_error` "skip", records that cannot be read are left out,
    named on stderr and counted. `fresh` is `new_manifest(files, tokenizer, options)`, if the caller has it already.
    `outer_command`: this is a part of another command, so no message names an option of `tnllm data tokenize`. Raises
    UserError for bad input or a folder made with other options, RunError for a full disk or a lost worker; finished shards
    are kept in every case.
    """
    options = options or Options()
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"the validation fraction is {options.val_fraction}; give a share from 0 to below 1")
    check_output_folder(out, "the output")
    refuse_replacing(local_files(files), out)
    fresh = fresh or new_manifest(files, tokenizer, options)

    def tell_wait() -> None:
        print(f"waiting for another process that is writing {out}", file=sys.stderr, flush=True)

    try:
        # The cache of tokens is shared: what another run is writing there is what this one needs.
        with only_writer(out, wait_s=math.inf if outer_command else 0, on_wait=tell_wait):
            manifest = begin_folder(out, fresh, tokenizer, overwrite, outer_command)
            if manifest.complete:
                return manifest
            total_bytes = sum(file["bytes"] for file in manifest.inputs)
            workers = workers or max(1, min(num_cores(), total_bytes // _BYTES_PER_WORKER))
            advice = _OUTER_ADVICE if outer_command else _ADVICE
            groups = read_groups(files, manifest, options, on_error, advice, folder=out)
            with closing(encode_groups(groups, tokenizer, options, workers)) as encoded:
                manifest = _write(out, manifest, encoded, shard_tokens, total_bytes, report)
            return _finish(out, manifest, options)
    except BrokenProcessPool:
        fewer = "" if outer_command else ", or with fewer --workers"
        raise RunError(f"a worker died (out of memory?); run the same again{fewer}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk of {out} is full; free some space and run the same again to resume") from None
        raise


def prepare(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    options: Options | None = None,
    workers: int | None = None,
    report: Report = lambda status: None,
) -> Path:
    """The shard folder of a recipe's `data.path`: the path itself if it is one, else its text tokenized into `cache_dir`.

    `path` may be the name of a corpus that ships (`assets.named`), or a URL. The cache (~/.cache/tnllm/tokens) is keyed by
    content, tokenizer and options, and locked, so several processes may ask for the same folder at once. A URL is its own
    key: what is behind it must stay as it was, and once all of it is here the network is not needed. Raises UserError for
    a shard folder made with another tokenizer, for a URL whose content changed, and what `tokenize_corpus` raises.
    """
    cache = cache_dir or Path.home() / ".cache" / "tnllm" / "tokens"
    options = options or Options()
    if is_remote(path):
        return _prepare_remote(str(path), tokenizer, cache, options, workers, report)
    source = assets.named(local_path(path))
    if shards.is_shard_folder(source):
        if shards.read_manifest(source).tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{source} was made with another tokenizer than {tokenizer.path}; "
                f"use {source / FILE_NAME} or tokenize again"
            )
        return source
    files = find_files([source])
    fresh = new_manifest(files, tokenizer, options)
    folder = cache_folder(cache, source.name, fresh, [file["sha256"] for file in fresh.inputs])
    tokenize_corpus(files, folder, tokenizer, options, workers=workers, report=report, fresh=fresh, outer_command=True)
    return folder


def _prepare_remote(
    url: str, tokenizer: Tokenizer, cache: Path, options: Options, workers: int | None, report: Report
) -> Path:
    name = url.rstrip("/").rpartition("/")[2]
    folder = cache_folder(cache, name, new_manifest([], tokenizer, options), [url])
    try:
        files = find_sources([url])
    except RunError as error:
        if not (shards.is_shard_folder(folder) and shards.read_manifest(folder).complete):
            raise
        log(f"{error}; all of it was tokenized before, and {folder} is used")
        return folder
    tokenize_corpus(files, folder, tokenizer, options, workers=workers, report=report, outer_command=True)
    return folder


def cache_folder(cache: Path, name: str, manifest: Manifest, content: list[str]) -> Path:
    """Where the tokens of `content` with a manifest's tokenizer and options are; `name` is for people."""
    identity = repr((manifest.tokenizer_sha256, manifest.options, content))
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    plain = re.sub(r"[^\w-]", "", name.partition(".")[0]) or "corpus"
    return cache / f"{plain}-{key}"


def new_manifest(files: Sequence[Path | RemoteFile], tokenizer: Tokenizer, options: Options) -> Manifest:
    """The manifest of a run that has not started; reads every local file once for its hash."""
    return Manifest(
        dtype=shards.token_dtype(tokenizer.vocab_size).str,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        options=asdict(options),
        inputs=inputs_of(files),
    )


def inputs_of(files: Sequence[Path | RemoteFile]) -> list[dict[str, Any]]:
    """What a manifest says of its inputs."""
    return [
        {"file": str(file), "bytes": stored_size(file), "sha256": sha256_file(file)}
        if isinstance(file, Path)
        else {"file": file.url, "bytes": file.size, "version": file.version}
        for file in files
    ]


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_folder(out: Path, fresh: Manifest, tokenizer: Tokenizer, overwrite: bool, outer_command: bool) -> Manifest:
    """The manifest to resume from: the folder's own if it was made with the same options, else a fresh one."""
    if shards.is_shard_folder(out) and not overwrite:
        old = shards.read_manifest(out)
        if change := _difference(old, fresh):
            other = "remove that folder" if outer_command else "choose another folder or start again with --overwrite"
            raise UserError(f"{out} was made with {change}; {other}")
        return old
    others = sorted(path.name for path in out.iterdir() if not _is_ours(path))
    if others and not shards.is_shard_folder(out):
        raise UserError(f"{out} is not empty (it holds {others[0]}); choose a new folder")
    _clear(out)
    write_bytes_atomic(out / FILE_NAME, tokenizer.path.read_bytes())
    lengths = np.array([len(data) for data in tokenizer.token_bytes], "<u2")
    write_bytes_atomic(out / shards.TOKEN_BYTES, lengths.tobytes())
    shards.write_manifest(out, fresh)
    return fresh


def _difference(old: Manifest, new: Manifest) -> str:
    if old.tokenizer_sha256 != new.tokenizer_sha256:
        return f"another tokenizer (sha256 {old.tokenizer_sha256[:12]}..., now {new.tokenizer_sha256[:12]}...)"
    for name, value in new.options.items():
        if old.options.get(name) != value:
            return f"--{name.replace('_', '-')} {old.options.get(name)} (now {value})"
    if len(old.inputs) != len(new.inputs):
        return f"{len(old.inputs)} input files (now {len(new.inputs)})"
    for before, now in zip(old.inputs, new.inputs, strict=True):
        if _content(before) != _content(now):
            if before["file"] == now["file"]:
                return f"another content of {now['file']} ({_described(before)}, now {_described(now)})"
            return f"{before['file']} ({_described(before)}), not {now['file']} ({_described(now)})"
    return ""


def _content(item: dict[str, Any]) -> tuple[Any, ...]:
    """What an input of a manifest holds: a local file's hash; the place, version and size of a remote one."""
    return (item["sha256"],) if "sha256" in item else (item["file"], item["version"], item["bytes"])


def _described(item: dict[str, Any]) -> str:
    return f"{item['bytes']:,} bytes" + (f", {item['version']}" if item.get("version") else "")


def _is_ours(path: Path) -> bool:
    fixed = (shards.MANIFEST, shards.TOKEN_BYTES, FILE_NAME, LOCK)
    is_shard = path.name.startswith(("train-", "val-")) and path.suffix in (".bin", ".idx")
    return path.name in fixed or is_shard or ".tmp-" in path.name


def _clear(out: Path) -> None:
    # The manifest goes first: without it the folder no longer counts as token shards.
    (out / shards.MANIFEST).unlink(missing_ok=True)
    for path in list(out.iterdir()):
        if _is_ours(path) and path.name != LOCK:
            path.unlink()


@dataclass(frozen=True)
class _State:
    """What is on disk (`manifest`) and what is collected for the next shards.

    Immutable and replaced in one assignment, so Ctrl-C at any point leaves a state that can be written.
    """

    manifest: Manifest
    position: tuple[int, int]
    skipped: dict[str, int]
    parts: tuple[tuple[str, np.ndarray, list[int], int], ...] = field(default=())
    tokens: int = 0


def _write(
    out: Path,
    manifest: Manifest,
    encoded: Iterator[tuple[Group, Encoded]],
    shard_tokens: int,
    total_bytes: int,
    report: Report,
) -> Manifest:
    """Write all groups as shards of about `shard_tokens` tokens; Ctrl-C and bad input still write what was encoded."""
    state = _State(manifest, manifest.position, manifest.skipped)
    documents, tokens = manifest.total("documents"), manifest.total("tokens")
    try:
        for group, result in encoded:
            state = _added(state, group, result)
            documents, tokens = documents + len(result.lengths), tokens + len(result.tokens)
            report(Status(group.done_bytes, total_bytes, documents, tokens))
            if state.tokens >= shard_tokens:
                state = _flushed(out, state)
    except (KeyboardInterrupt, UserError, BrokenProcessPool):
        _flushed(out, state)
        raise
    return _flushed(out, state).manifest


def _added(state: _State, group: Group, encoded: Encoded) -> _State:
    is_val = np.array(encoded.is_val, bool)
    lengths, text_bytes = np.array(encoded.lengths, np.int64), np.array(encoded.text_bytes, np.int64)
    parts = list(state.parts)
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        if chosen.any():
            tokens = encoded.tokens[np.repeat(chosen, lengths)]
            parts.append((split, tokens, lengths[chosen].tolist(), int(text_bytes[chosen].sum())))
    return _State(state.manifest, group.position, group.skipped, tuple(parts), state.tokens + len(encoded.tokens))


def _flushed(out: Path, state: _State) -> _State:
    """Write what is collected, then the manifest that lists it."""
    written = list(state.manifest.shards)
    for split in shards.SPLITS:
        parts = [part for part in state.parts if part[0] == split]
        if parts:
            number = sum(shard.split == split for shard in written)
            tokens = np.concatenate([part[1] for part in parts])
            lengths = [length for part in parts for length in part[2]]
            text_bytes = sum(part[3] for part in parts)
            written.append(shards.write_shard(out, split, number, tokens, lengths, text_bytes))
    manifest = replace(state.manifest, shards=written, position=state.position, skipped=state.skipped)
    shards.write_manifest(out, manifest)
    return _State(manifest, state.position, state.skipped)


def _finish(out: Path, manifest: Manifest, options: Options) -> Manifest:
    if not manifest.total("tokens"):
        _clear(out)
        files, skipped = len(manifest.inputs), manifest.skipped
        raise UserError(
            f"the corpus is empty: no text in {files} file{'s' * (files != 1)}, "
            f"{skipped['empty']} empty and {skipped['bad']} bad documents"
        )
    if options.val_fraction and not manifest.total("tokens", "val"):
        manifest = _hold_out_end(out, manifest, options.val_fraction)
    manifest = replace(manifest, complete=True)
    shards.write_manifest(out, manifest)
    kept = {shards.TOKEN_BYTES} | {shard.file for shard in manifest.shards}
    for path in list(out.iterdir()):
        stray = path.suffix in (".bin", ".idx") and path.with_suffix(".bin").name not in kept
        if _is_ours(path) and (stray or ".tmp-" in path.name):
            path.unlink()
    return manifest


def _hold_out_end(out: Path, manifest: Manifest, fraction: float) -> Manifest:
    """Move the last `fraction` of the tokens, at most half a shard, to "val"; may split a document."""
    *others, last = manifest.shards
    stream = shards.TokenStream(out, "train", replace(manifest, shards=[last]))
    cut = last.tokens - min(max(2, round(manifest.total("tokens") * fraction)), last.tokens // 2)
    if last.tokens - cut < 2:
        return manifest
    tokens = stream.read(0, last.tokens).astype(manifest.dtype)
    edges = stream.document_starts(0, last.tokens)

    def write(split: str, number: int, begin: int, end: int) -> Shard:
        inner = edges[(edges > begin) & (edges < end)]
        lengths = np.diff([begin, *inner, end]).tolist()
        text_bytes = int(stream.token_bytes[tokens[begin:end]].astype(np.int64).sum())
        return shards.write_shard(out, split, number, tokens[begin:end], lengths, text_bytes)

    # The shorter shard gets a new name: the old one must stay intact until the manifest is replaced.
    shorter = write("train", len(manifest.shards), 0, cut)
    return replace(manifest, shards=[*others, shorter, write("val", 0, cut, last.tokens)])
