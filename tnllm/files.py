"""Files written whole or not at all, and the numbers people read and type.

write_text_atomic(folder / "latest", "step-00001000")
parse_count("0.5M")     # 500000
format_bytes(3 << 30)   # "3.00 GiB"
"""

import os
import re
import shutil
from pathlib import Path

from tnllm.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` aside, flush it to disk and rename it to `path`: readers see the old file or the new."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def replace_dir(aside: Path, final: Path) -> None:
    """Flush every file of `aside` to disk and rename the folder to `final`, replacing one that is there.

    The old folder goes only when the new one is in its place; if anything stops this before, it stays.
    """
    for file in aside.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = final.with_name(f"{final.name}.tmp-old")
    try:
        if final.exists():
            # One that a kill left behind while `final` was already the newer.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(aside, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def parse_count(value: int | float | str, name: str = "count") -> int:
    """Read a count such as `12`, `"0.5M"` or `"300B"` (K, M, B or G, T are powers of 1000).

    Raises UserError for anything else, negative numbers included.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)\s*", str(value).upper())
        if match is None:
            raise UserError(f"{name} is {value!r}; write a number such as 5000, 0.5M or 300B")
        number, unit = float(match[1]), match[2]
    total = number * _UNITS[unit]
    if total < 0 or total != total or abs(total - round(total)) > 1e-6 * max(total, 1.0):
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 0")
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
