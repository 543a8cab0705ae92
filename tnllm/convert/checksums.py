"""SHA-256 of the files of a folder, from wherever they were recorded.

    wanted = recorded_sums(folder, files)        # file → 64 hex digits, for the files somebody recorded
    verify_sums(wanted, progress)                # raises RunError naming the first file that differs

Records: the SHA256SUMS beside the files (`tnllm convert` writes one, `sha256sum -c SHA256SUMS` reads it), the manifest of a
training checkpoint, what the Hugging Face downloader notes under .cache, and its cache's file names. Zip archives, which
`.bin` files are, carry a CRC-32 of each record.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from tnllm.errors import RunError

SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
# Called with a stage, what is done and what is all, in bytes.
Progress = Callable[[str, int, int], None]
_HEX = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**22


def recorded_sums(folder: Path, files: list[Path]) -> dict[Path, str]:
    """The recorded SHA-256 of each of `files` that has one."""
    sums: dict[Path, str] = {}
    for file in files:
        digest = _downloaded(file)
        if digest is not None:
            sums[file] = digest
    if (folder / MANIFEST).is_file():
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            listed = {name: entry[1] for name, entry in manifest.items()}
        except (ValueError, TypeError, AttributeError, LookupError):
            raise RunError(f"{folder / MANIFEST} is damaged; take another step") from None
        sums.update({file: listed[str(file.relative_to(folder))] for file in files if _inside(file, folder, listed)})
    if (folder / SUMS).is_file():
        listed = {}
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition(" ")
            # Before the name stands a space, or the star of `sha256sum --binary`.
            listed[name[1:]] = digest
        sums.update({file: listed[file.name] for file in files if file.parent == folder and file.name in listed})
    return sums


def _inside(file: Path, folder: Path, listed: dict[str, str]) -> bool:
    return file.is_relative_to(folder) and str(file.relative_to(folder)) in listed


def _downloaded(file: Path) -> str | None:
    """What the Hugging Face downloader knows: the second line of its note, or the blob a cached file points to."""
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if note.is_file():
        lines = note.read_text(encoding="utf-8").splitlines()
        # Small files have a git hash there instead, of 40 digits.
        if len(lines) > 1 and _HEX.fullmatch(lines[1]):
            return lines[1]
    if file.is_symlink() and _HEX.fullmatch(file.resolve().name):
        return file.resolve().name
    return None


def verify_sums(wanted: dict[Path, str], progress: Progress) -> None:
    """Read the files and compare. Raises RunError."""
    total = sum(file.stat().st_size for file in wanted)
    done = 0
    for file, digest in wanted.items():
        found = hashlib.sha256()
        with open(file, "rb") as handle:
            while block := handle.read(_BLOCK):
                found.update(block)
                done += len(block)
                progress("checking SHA-256", done, total)
        if found.hexdigest() != digest:
            raise RunError(f"{file} was changed or damaged: its SHA-256 is not the recorded one; copy it again")


def verify_archives(files: list[Path], progress: Progress) -> None:
    """Compare the CRC-32 of every record of zip archives among `files`. Raises RunError."""
    archives = [file for file in files if zipfile.is_zipfile(file)]
    total = sum(file.stat().st_size for file in archives)
    done = 0
    for file in archives:
        try:
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    with archive.open(record) as handle:
                        while block := handle.read(_BLOCK):
                            done += len(block)
                            progress("checking CRC-32", done, total)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise RunError(f"{file} is damaged ({error}); copy it again") from None


def write_sums(sums: dict[str, str]) -> str:
    """The text of a SHA256SUMS file."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
