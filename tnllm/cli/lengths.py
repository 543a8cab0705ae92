"""Lengths as benchmarks take them: 1k, 64k, 1m (powers of 1024), lists and doublings."""

from tnllm.errors import UserError


def parse_length(text: str, flag: str) -> int:
    """`64k` → 65536. Raises UserError that names `flag`."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in ("k", "m") else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise UserError(f"{flag} has {text!r}; write tokens such as 1000, 64k (65536) or 1m (1048576)")
    return int(number) * {"": 1, "k": 1 << 10, "m": 1 << 20}[unit]


def parse_lengths(text: str, flag: str = "--seqlens") -> list[int]:
    """`1k,4k`, or `1k:64k` for every doubling."""
    if ":" not in text:
        return [parse_length(part.strip(), flag) for part in text.split(",")]
    low, high = (parse_length(part.strip(), flag) for part in text.split(":", 1))
    if low > high:
        raise UserError(f"{flag} is {text!r}; the first length must not exceed the second")
    lengths = []
    while low <= high:
        lengths.append(low)
        low *= 2
    return lengths
