"""Documents of local files and of URLs: http(s)://, hf://, s3://, gs:// and whatever else fsspec reads.

files = find_sources(["s3://bucket/corpus/", "more.jsonl"])
for document in read_documents(files, field="text"):    # one remote file at a time is on the disk
    document.text, document.where                       # "s3://bucket/corpus/web.jsonl.zst:17"

A remote file is what it was when it was found: if its ETag (or its date, where a server gives no ETag) or its size is
another one later, it is refused, so that a stopped run never continues with other text.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from tnllm.data.compressed import stored_size
from tnllm.data.corpus import ALLOWED, SplitOn, find_files, is_corpus_file, kind_of, read_file
from tnllm.data.documents import BadDocument, Document
from tnllm.errors import MissingExtra, RunError, UserError, optional_import
from tnllm.files import format_bytes
from tnllm.progress import Report, Status, log

# What storages call the version of a file's content, the surest first.
_VERSIONS = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "Content-MD5", "Digest", "generation")
_DATES = ("LastModified", "Last-Modified", "last_modified", "last_commit", "updated", "mtime", "created")
_TRIES = 4
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was found; `size` in bytes as stored, 0 where the server does not say.

    `url` is a path for a local file that must not change while it is read (`described_sources`).
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    def __str__(self) -> str:
        return self.url


def is_remote(given: str | Path) -> bool:
    """Whether an input is a URL of another place than this machine's file system."""
    scheme, separator, _ = str(given).partition("://")
    return bool(separator) and scheme.lower() != "file"


def local_path(given: str | Path) -> str | Path:
    """The path of a file:// URL; anything else as it is."""
    text = str(given)
    return unquote(urlsplit(text).path) if text.lower().startswith("file://") else given


def find_sources(inputs: Iterable[str | Path], leave_out: Path | None = None) -> list[Path | RemoteFile]:
    """Local and remote corpus files of `inputs` in order; a remote folder or pattern (*) stands for its files, sorted.

    Raises what `find_files` raises, UserError for a URL without a corpus file, RunError where the network fails.
    """
    found: list[Path | RemoteFile] = []
    for given in inputs:
        if is_remote(given):
            found += _find_remote(str(given))
        else:
            found += find_files([local_path(given)], leave_out)
    for number, file in enumerate(found):
        if file in found[:number]:
            raise UserError(f"{file} is given twice; name each file once")
    return found


@contextmanager
def local_copy(file: Path | RemoteFile, folder: Path | None) -> Iterator[Path]:
    """A remote file as a temporary one in `folder`, which ends with the block; a local file as it is.

    A UserError inside the block that names the copy names the URL instead. Raises RunError for a file that changed.
    """
    if isinstance(file, Path):
        yield file
        return
    if not is_remote(file.url):
        check_unchanged(file)
        yield Path(file.url)
        check_unchanged(file)
        return
    assert folder is not None
    # The mark tells others that the file is not part of the folder.
    path = folder / f"source.tmp-{file.name}"
    try:
        _download(file, path)
        yield path
    except UserError as error:
        raise type(error)(str(error).replace(str(path), file.url)) from error
    finally:
        path.unlink(missing_ok=True)


def described_sources(given: str) -> list[RemoteFile]:
    """`find_sources` of one input, local files described by their time and size instead of read for a hash."""
    found = find_sources([given])
    return [file if isinstance(file, RemoteFile) else _local_file(str(file.absolute())) for file in found]


def _local_file(path: str) -> RemoteFile:
    about = os.stat(path)
    return RemoteFile(path, about.st_size, f"mtime {about.st_mtime_ns}")


def check_unchanged(file: RemoteFile, only_local: bool = False) -> None:
    """Raise RunError unless a file is what it was when it was found; `only_local`: do not ask the network."""
    if not is_remote(file.url):
        try:
            _compare(file, _local_file(file.url))
        except OSError as error:
            raise RunError(f"{file.url} cannot be read any more: {error.strerror}") from None
    elif not only_local:
        storage, path = open_url(file.url)
        # Some storages remember what they listed.
        storage.invalidate_cache()
        _compare(file, _described(storage, path, file.url))


def read_documents(
    files: Sequence[Path | RemoteFile],
    field: str = "text",
    split_on: SplitOn = "none",
    on_bad: Callable[[BadDocument], None] | None = None,
    report: Report = lambda status: None,
    more: Sequence[str] | None = None,
    advice: str = "fix it",
    folder: Path | None = None,
) -> Iterator[Document]:
    """Every document of `files` in order, empty ones included; `report` is called after each.

    What cannot be read (invalid JSON, a missing or non-string field, text that is not UTF-8, the rest of a damaged file)
    goes to `on_bad` and reading continues; without `on_bad` it raises UserError, or RunError for damage, with file, line
    and `advice`. `more`: see `read_file`; `folder`: see `read_source`.
    """
    total = sum(stored_size(file) if isinstance(file, Path) else file.size for file in files)
    before = count = 0
    for file in files:
        position = 0
        for item in read_source(file, folder, field, split_on, more=more):
            if isinstance(item, Document):
                count, position = count + 1, item.position
                report(Status(before + position, total, count))
                yield item
            elif on_bad is None:
                raise (RunError if item.is_damage else UserError)(f"{item}; {advice}")
            else:
                on_bad(item)
        before += max(position, stored_size(file) if isinstance(file, Path) else file.size)


def read_source(
    file: Path | RemoteFile, folder: Path | None, *how: Any, **more: Any
) -> Iterator[Document | BadDocument]:
    """`read_file` of a local or remote file, named as a person gave it.

    A remote one is in `folder` (None: a temporary one) while it is read.
    """
    temporary = TemporaryDirectory() if folder is None else nullcontext(folder)
    with temporary as base, local_copy(file, Path(base)) as path:
        for item in read_file(path, *how, **more):
            if isinstance(file, Path):
                yield item
            elif isinstance(item, Document):
                yield replace(item, url=file.url)
            else:
                where, reason = (text.replace(str(path), file.url) for text in (item.where, item.reason))
                yield BadDocument(where, reason, item.is_damage)


def local_files(files: Sequence[Path | RemoteFile]) -> list[Path]:
    """Those that are on this machine."""
    return [file for file in files if isinstance(file, Path)]


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    with optional_import("remote", "fsspec"):
        import fsspec
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        packages = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
        scheme = url.partition("://")[0].lower()
        raise MissingExtra("remote", packages.get(scheme, str(error))) from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}; allowed are http(s)://, hf://, s3://, gs:// and others that fsspec knows"
        ) from None


def _find_remote(url: str) -> list[RemoteFile]:
    storage, path = open_url(url)

    def find() -> list[RemoteFile]:
        if "*" in path:
            paths = storage.glob(path)
        elif url.endswith("/") or storage.info(path).get("type") == "directory":
            paths = storage.find(path)
        else:
            if kind_of(Path(RemoteFile(url, 0, "").name)) is None:
                raise UserError(f"{url} is not in a known corpus format; allowed: {ALLOWED}")
            return [_described(storage, path, url)]
        urls = {storage.unstrip_protocol(item): item for item in paths}
        wanted = sorted(item for item in urls if is_corpus_file(Path(RemoteFile(item, 0, "").name)))
        if not wanted:
            raise UserError(f"{url} holds no corpus file; allowed: {ALLOWED}")
        return [_described(storage, urls[item], item) for item in wanted]

    return _tried(url, find)


def _described(storage: Any, path: str, url: str) -> RemoteFile:
    info = storage.info(path)
    known = {name: str(info[name]) for name in (*_VERSIONS, *_DATES) if info.get(name)}
    if not known:
        log(f"{url} has neither an ETag nor a date, so only a change of its size would be noticed")
    # One name alone: servers that answer in turn may agree on the first and differ in the others.
    version = next((f"{name} {value}" for name, value in known.items()), "")
    return RemoteFile(url, int(info.get("size") or 0), version)


def _download(file: RemoteFile, path: Path) -> None:
    """Fetch a file. Raises RunError if it is not what it was, or cannot be read after a few tries."""
    storage, inner = open_url(file.url)
    log(f"reading {file.url}" + (f" ({format_bytes(file.size)})" if file.size else ""))

    def fetch() -> None:
        check_unchanged(file)
        storage.get_file(inner, str(path))
        if file.size and path.stat().st_size != file.size:
            raise OSError(f"the transfer ended after {path.stat().st_size:,} of {file.size:,} bytes")
        check_unchanged(file)

    _tried(file.url, fetch)


def _tried(url: str, work: Callable[[], T]) -> T:
    """`work()`, again if the network fails, a few times; the last failure is shown."""
    with network(url):
        for left in reversed(range(_TRIES)):
            try:
                return work()
            # Each storage's library has exceptions of its own.
            except Exception as error:
                if not left or isinstance(error, (UserError, ImportError)) or _is_missing(error):
                    raise
                log(f"{url}: {error}; trying again")
                time.sleep(2.0 ** (_TRIES - left) / 4)
    raise AssertionError


def _compare(file: RemoteFile, now: RemoteFile) -> None:
    if now != file:
        before, after = (f"{item.version or 'no version'}, {item.size:,} bytes" for item in (file, now))
        raise RunError(f"{file.url} changed since it was found: it was {before}, and is {after}; start again")


@contextmanager
def network(url: str, do: str = "be read") -> Iterator[None]:
    """Failures of the network and of storages as one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise MissingExtra("remote", str(error)) from None
    # aiohttp, botocore, gcsfs and huggingface_hub share no base class.
    except Exception as error:
        if _is_missing(error):
            raise UserError(f"there is nothing at {url}; check the URL") from None
        cause = error.__cause__ or error
        raise RunError(f"{url} cannot {do}: {str(cause) or type(cause).__name__}") from error


def _is_missing(error: Exception) -> bool:
    """Whether a storage answered that it has no such file; a server that cannot be reached looks the same at first."""
    cause = error.__cause__
    answered = cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
    return isinstance(error, FileNotFoundError) and answered
