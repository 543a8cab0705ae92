"""Files and folders written completely or not at all, read with a clear error, and locked; and the numbers people type.

write_text_atomic(folder / "latest", "step-00001000")
with written_folder(Path("weights")) as temporary:      # renamed to weights/ when the block ends without an error
    (temporary / "config.json").write_text("{}")
check_output_file(Path("loss.png"), "--plot")           # before the work that ends with writing it
values = read_json(folder / "config.json")              # a dict, or one clear line
with only_writer(Path("runs/first")):                   # refuses a second writer by pid and host; ends with the process
    ...
parse_count("0.5M")                                     # 500000
format_bytes(3 << 30)                                   # "3.00 GiB"
"""

import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tnllm.errors import UserError

LOCK = ".lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; the containers of one machine share it
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file, flush it to disk and rename it to `path`: readers see the old file or the new.

    What is not a regular file, such as `/dev/stdout`, is written as it is. An OSError names `path`.
    """
    path = Path(path)
    if is_special(path):
        path.write_bytes(data)
        return
    target = end_of_links(path)
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(target.parent)


def end_of_links(path: Path) -> Path:
    """The file that is written for `path`: where its symbolic links lead, so that a link stays one."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _named(error: OSError, path: Path) -> OSError:
    """`error` about `path`: a person did not give the temporary file's name."""
    return type(error)(error.errno, error.strerror, str(path))


def is_special(path: Path) -> bool:
    """Whether `path` exists and is neither a regular file nor a folder: a device, a pipe, a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_output_file(path: Path, name: str, inputs: Sequence[Path] = ()) -> None:
    """Raise UserError unless a file can be written at `path`, which replaces none of `inputs`. `name` is the option."""
    if path.name in ("", "..") or os.path.isdir(path):
        raise UserError(f"{name} is {path}, a folder; give the name of a file to write")
    target = end_of_links(path)
    if not os.path.isdir(target.absolute().parent):
        raise UserError(f"{name} is {path}: there is no folder {target.parent}; make it first, or give another file")
    for other in inputs:
        if _is_same(path, other):
            raise UserError(f"{name} is {path}, which is also the input; give another file, so that no input is lost")
    if is_special(path):
        return
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{name} is {path}, which may not be written (its permissions); give another file")
    _try_writing(_temporary(target), f"{name} is {path}, which cannot be written")


def check_output_folder(path: Path, name: str) -> None:
    """Raise UserError unless files can be written into the folder `path`, which need not exist. `name` is the option."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        # As a path it would be a folder of that odd name here.
        raise UserError(f"{name} is the URL {path}; give a folder (tnllm data tokenize and data clean write to URLs)")
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        raise UserError(f"{name} is {path}, and {existing} is a file, not a folder; give another folder")
    probe = existing / f"{path.name[:100]}.tmp-{os.getpid()}"
    _try_writing(probe, f"{name} is {path}, and nothing can be written into {existing}")


def _try_writing(file: Path, message: str) -> None:
    # Only an attempt tells: permissions, read-only disks, names that are too long.
    try:
        file.touch()
        file.unlink()
    except OSError as error:
        raise UserError(f"{message} ({error.strerror}); give another one") from None


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` and, above them, all their keys; a key that a row lacks is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def replace_dir(temporary: Path, final: Path) -> None:
    """Flush every file of `temporary` to disk and rename the folder to `final`, replacing an older one.

    The older folder is deleted only after the rename; if anything fails before, it stays.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = final.with_name(f"{final.name}.tmp-old")
    try:
        if final.exists():
            # Left behind by a process that was killed after its rename.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(temporary, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def free_name(path: Path) -> Path:
    """`path`, or the first that does not exist of those with -2, -3 ... before its suffix."""
    stem, suffix, number = path.stem, path.suffix, 2
    while path.exists():
        path = path.with_name(f"{stem}-{number}{suffix}")
        number += 1
    return path


@contextmanager
def written_folder(final: Path, suffix: str = "save") -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`; rename it to `final` (`replace_dir`) if the block succeeds.

    Whatever the block raises, the temporary folder is removed and an older `final` is untouched. A folder of the same
    name left by a killed process is removed first. `.tmp-` in the name tells readers to ignore it.
    """
    final = Path(final)
    temporary = final.with_name(f"{final.name}.tmp-{suffix}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_dir(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, advice: str = "fix it or remove it") -> dict[str, Any]:
    """The JSON object in a UTF-8 file. Raises UserError, which ends with `advice`, for a missing file or other content."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {advice}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}; {advice}")
    return values


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_writer(
    folder: Path, force: bool | None = None, wait_s: float = 0, on_wait: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Be the only process that writes `folder`, created if missing. Readers need no lock.

    `folder`/.lock is held by flock, so it is free when its process ends, even if killed. Inside it a JSON object says
    by whom the folder is written: `written_by` (the command), `pid`, `host`, `boot` (of the machine) and `since`. It is
    removed at the end, and with it a folder made here that is still empty. Yields the descriptor: a child process that
    inherits it (`pass_fds`) holds the lock too.

    Calls `on_wait` once before it waits for another writer, and raises UserError, which names that writer, if there still
    is one after `wait_s`. A .lock left by another machine is refused too, since that machine may still be writing; `force`
    ignores it. None: this command has no --force-unlock.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that imports the script which started it: to wait for that one's lock would never end.
        raise SystemExit('tnllm: a worker ran the whole script again; put its code under if __name__ == "__main__":')
    folder = Path(folder)
    path, made = folder / LOCK, [item for item in (folder, *folder.parents) if not item.exists()]
    until, waiting = time.monotonic() + wait_s, False
    while (handle := _take(path)) is None:
        if time.monotonic() >= until:
            raise UserError(f"{folder} is being written by {_writer(path)}; wait for it, or choose another folder")
        if not waiting:
            on_wait()
        waiting = True
        time.sleep(0.1)
    try:
        record = _record(path)
        ours = {"host": socket.gethostname(), "boot": _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""}
        if record and not force and all(record.get(key) != value for key, value in ours.items()):
            how = f"remove {path}" if force is None else "add --force-unlock"
            raise UserError(
                f"{folder} was being written by {_writer(path)}, and this machine cannot tell whether that still runs; "
                f"if it has ended, {how}"
            )
        command = shlex.join(["tnllm", *sys.argv[1:]])
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record = {"written_by": command, "pid": os.getpid(), **ours, "since": since}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(record).encode(), 0)
        try:
            yield handle
        finally:
            # While it is held: a process that opened it meanwhile sees that its file is gone, and opens the new one. The
            # folder may have been replaced by another one, whose .lock is not ours.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                path.unlink()
            for item in made:
                if item.is_dir() and not any(item.iterdir()):
                    item.rmdir()
    finally:
        os.close(handle)


def _take(path: Path) -> int | None:
    """A descriptor of `path` that holds its lock; None if another process holds it."""
    try:
        import fcntl
    except ImportError:
        raise UserError("writing needs the file locks of Linux or macOS") from None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path.parent} is a file, or below one, not a folder; give another folder") from None
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(
                f"{path} is not a file, so {path.parent} cannot be locked; remove it, or choose another folder"
            )
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was made for nothing by another process, and removed just now
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise UserError(
                    f"the file system of {path.parent} has no locks ({error.strerror}); use another"
                ) from None
            raise
        os.close(handle)


def _record(path: Path) -> dict[str, Any]:
    """What .lock says of its writer; empty if it says nothing readable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _writer(path: Path) -> str:
    record = _record(path)
    if not record:
        return "another process"
    command = str(record.get("written_by"))
    command = command if len(command) <= 100 else f"{command[:97]}..."
    return f"pid {record.get('pid')} on {record.get('host')} ({command}, since {record.get('since')})"


def parse_count(value: int | float | str, name: str = "count") -> int:
    """Read a count such as `12`, `"0.5M"` or `"300B"` (K, M, B or G, T are powers of 1000).

    Raises UserError for anything else, negative numbers included.
    """
    number: int | float
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = value, ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)\s*", str(value).upper())
        if match is None:
            raise UserError(f"{name} is {value!r}; write a number such as 5000, 0.5M or 300B")
        number, unit = float(match[1]), match[2]
    total = number * _UNITS[unit]
    if not 0 <= total < 2**63 or abs(total - round(total)) > 1e-6 * max(total, 1.0):
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 0, and below 9.2e18")
    return round(total)


def format_count(number: float) -> str:
    """`1234567` → `"1.23M"`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """`3221225472` → `"3.00 GiB"`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """`4000` → `"1h06m"`; days above 48 hours, years above two, tenths of seconds below a minute."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 2 * 365 * 24:
        return f"{hours / (365 * 24):,.0f} years"
    if hours >= 48:
        return f"{hours / 24:.1f}d"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
