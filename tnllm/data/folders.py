"""Input files below a folder, and the check that no output replaces an input.

files = files_below(Path("corpus"), lambda path: path.suffix == ".jsonl")
refuse_replacing(files, Path("out"))        # UserError if a file is `out` or lies below it
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tnllm.errors import UserError
from tnllm.progress import log

_MAX_KINDS = 5


def files_below(folder: Path, is_wanted: Callable[[Path], bool], leave_out: Path | None = None) -> list[Path]:
    """The wanted files below `folder`, sorted by path; hidden ones and the folder `leave_out` are skipped.

    Linked folders are followed, after all others; one that is reached a second time, as in a loop of links, adds nothing.
    A link to nothing, a second name of a file, and what may not be read are named on stderr; files that are not wanted are
    counted there by the end of their names.
    """
    seen_folders = {os.path.realpath(leave_out)} if leave_out is not None else set()
    seen_files: dict[str, Path] = {}
    others: Counter[str] = Counter()
    pending = [folder]
    while pending:
        for base, names, files in os.walk(pending.pop(0), onerror=_name_unreadable):
            real = os.path.realpath(base)
            visible = sorted(name for name in names if not name.startswith("."))
            names[:] = []
            if real in seen_folders:
                continue
            seen_folders.add(real)
            # os.walk does not descend into links by itself.
            pending += [Path(base, name) for name in visible if os.path.islink(os.path.join(base, name))]
            names[:] = visible
            for path in (Path(base, name) for name in sorted(files) if not name.startswith(".")):
                if path.exists() and not is_wanted(path):
                    others[path.suffix or path.name] += 1
                elif why := _why_left_out(path, seen_files):
                    log(f"left out: {shown(path)} {why}")
    if seen_files and others:
        kinds = ", ".join(f"{shown(kind)} ({count:,})" for kind, count in others.most_common(_MAX_KINDS))
        log(f"left out: files of {folder} that are of other kinds: {kinds}{', ...' * (len(others) > _MAX_KINDS)}")
    return sorted(seen_files.values())


def _why_left_out(path: Path, seen: dict[str, Path]) -> str:
    """Add a file to `seen`, or say why it cannot be read."""
    if not path.exists():
        return "is a link to nothing"
    if not path.is_file():
        return "is not a regular file"
    if not is_unicode(str(path)):
        return "has a name that is not UTF-8"
    if not os.access(path, os.R_OK):
        return "may not be read (permission denied)"
    first = seen.setdefault(os.path.realpath(path), path)
    return "" if first == path else f"is another name of {first}"


def is_unicode(text: str) -> bool:
    """Whether a text, or a name that the system gave, can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(name: object) -> str:
    """A name in one line of UTF-8, whatever it holds."""
    return str(name).replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()


def _name_unreadable(error: OSError) -> None:
    log(f"left out: {shown(error.filename)} cannot be read ({error.strerror})")


def refuse_replacing(inputs: Iterable[str | Path], out: Path) -> None:
    """Raise UserError if an input is `out`, or lies in the folder `out`: writing there would replace it."""
    target = os.path.realpath(out)
    for path in inputs:
        real = os.path.realpath(path)
        if real == target or real.startswith(target.rstrip(os.sep) + os.sep):
            raise UserError(f"the output {out} would replace its own input {path}; choose another output")
