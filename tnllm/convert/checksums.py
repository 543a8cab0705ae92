"""Checksums of downloaded and converted files, compared with recorded ones.

    expected = recorded_sums(folder, files)      # file → SHA-256 in hex, for the files that have a record
    verify_sums(expected, progress)              # raises RunError naming the first file that differs

Records are: SHA256SUMS beside the files (`tnllm convert` writes it, `sha256sum -c SHA256SUMS` reads it), the manifest of a
training checkpoint, the Hugging Face downloader's metadata under .cache, and the file names of the Hugging Face cache.
`.bin` files are zip archives, which hold a CRC-32 of each record.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tnllm.errors import RunError

SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
# Called with the stage, what is done of it and its total; the unit is the stage's own.
Progress = Callable[[str, int, int], None]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**22


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise RunError, which names `file`, if the block cannot read it."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot read {file} ({error.strerror or error}); make it readable or copy it again") from None


def recorded_sums(folder: Path, files: list[Path]) -> dict[Path, str]:
    """Return the recorded SHA-256 of each of `files` that has one."""
    sums: dict[Path, str] = {}
    for file in files:
        with reading(file):
            digest = _downloaded_sum(file)
        if digest is not None:
            sums[file] = digest
    if (folder / MANIFEST).is_file():
        try:
            with reading(folder / MANIFEST):
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            listed = {name: entry[1] for name, entry in manifest.items()}
        except (ValueError, TypeError, AttributeError, LookupError):
            raise RunError(f"{folder / MANIFEST} is damaged; take another step") from None
        names = {file: str(file.relative_to(folder)) for file in files if file.is_relative_to(folder)}
        sums.update({file: listed[name] for file, name in names.items() if name in listed})
    if (folder / SUMS).is_file():
        listed = {}
        with reading(folder / SUMS):
            lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            digest, _, name = line.partition(" ")
            # A second space precedes the name, or the star of `sha256sum --binary`.
            listed[name[1:]] = digest
        sums.update({file: listed[file.name] for file in files if file.parent == folder and file.name in listed})
    return sums


def _downloaded_sum(file: Path) -> str | None:
    """The Hugging Face downloader's record: line 2 of its metadata file, or the name of the blob a cached file links to."""
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if metadata.is_file():
        lines = metadata.read_text(encoding="utf-8").splitlines()
        # Small files have a git hash of 40 digits there.
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return lines[1]
    if file.is_symlink() and _SHA256.fullmatch(file.resolve().name):
        return file.resolve().name
    return None


def verify_sums(expected: dict[Path, str], progress: Progress) -> None:
    """Read the files and compare their SHA-256. Raises RunError."""
    total = _total_bytes(expected)
    done = 0
    for file, expected_digest in expected.items():
        digest = hashlib.sha256()
        with reading(file), open(file, "rb") as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
                done += len(block)
                progress("checking SHA-256", done, total)
        if digest.hexdigest() != expected_digest:
            raise RunError(f"{file} was changed or damaged: its SHA-256 is not the recorded one; copy it again")


def verify_archives(files: list[Path], progress: Progress) -> None:
    """Check the CRC-32 of every record of the zip archives among `files`. Raises RunError."""
    archives = [file for file in files if zipfile.is_zipfile(file)]
    total = _total_bytes(archives)
    done = 0
    for file in archives:
        try:
            with reading(file), zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    with archive.open(record) as handle:
                        while block := handle.read(_BLOCK):
                            done += len(block)
                            progress("checking CRC-32", done, total)
        except (zipfile.BadZipFile, EOFError) as error:
            raise RunError(f"{file} is damaged ({error}); copy it again") from None


def _total_bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with reading(file):
            total += file.stat().st_size
    return total
