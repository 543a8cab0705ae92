"""Lengths as people type them: `1000`, `64k` (65536), `1m` (1048576), lists and ranges of them."""

from tnllm.errors import UserError


def length(text: str, flag: str) -> int:
    """One length; `flag` names where it came from. Raises UserError."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in ("k", "m") else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise UserError(f"{flag} has {text!r}; write tokens such as 1000, 64k (65536) or 1m (1048576)")
    return int(number) * {"": 1, "k": 1 << 10, "m": 1 << 20}[unit]


def lengths(text: str, flag: str) -> list[int]:
    """`1k,4k` or `1k:64k` (every doubling). Raises UserError."""
    if ":" not in text:
        return [length(part.strip(), flag) for part in text.split(",")]
    low, high = (length(part.strip(), flag) for part in text.split(":", 1))
    if low > high:
        raise UserError(f"{flag} is {text!r}; the first length must not exceed the second")
    found = []
    while low <= high:
        found.append(low)
        low *= 2
    return found
