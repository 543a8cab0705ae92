"""Values of options, checked before a command works for minutes: lengths, choices, lists, files to write and the device."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import typer

from tnllm.errors import UserError
from tnllm.files import check_output_file
from tnllm.progress import log

CHARTS = (".png", ".svg", ".pdf")
# Options that several commands share.
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")
DTYPE = typer.Option("auto", help="Of the weights: auto (float32 on CPU), float32 or bfloat16.")
MAX_MINUTES = typer.Option(
    None,
    min=0.0,
    help="Minutes for all measurements: what is forecast not to fit is extrapolated or skipped, and named. "
    "Default 1 on a CPU (bench-scale: 5), 60 on a GPU.",
)
SOFTMAX_EVERY = typer.Option(0, min=0, help="Every Nth layer of TransNormerLLM has softmax attention; 0: none.")
OVERWRITE = typer.Option(False, "--overwrite", help="Start over if the folder holds another run.")


class OnError(StrEnum):
    """What to do about a document that cannot be read."""

    stop = "stop"
    skip = "skip"


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options below one heading of a command's help."""
    return partial(typer.Option, rich_help_panel=title)


def examples(*commands: str) -> str:
    """The end of a command's help: each of `commands` on a line of its own."""
    # Typer joins lines; only an empty one between them ends a line.
    return "\n\n".join(["Examples:", *commands])


def length(text: str, flag: str) -> int:
    """`1000`, `64k` (65536) or `1m` (1048576); `flag` names the option in messages. Raises UserError."""
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
    return [low << power for power in range((high // low).bit_length())]


def counts(text: str, flag: str, example: str) -> list[int]:
    """Positive numbers with commas. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"{flag} is {text!r}; write numbers with commas, such as {example}")
    return [int(word) for word in words]


def check_choice(flag: str, value: str | None, allowed: Sequence[str]) -> None:
    """Raise UserError if `value` is given and not among `allowed`."""
    if value is not None and value not in allowed:
        raise UserError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}")


def choices(text: str, flag: str, allowed: Sequence[str]) -> list[str]:
    """Several of `allowed` with commas. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in allowed:
            raise UserError(f"{flag} has {word!r}; allowed: {', '.join(allowed)}")
    return words


def check_outputs(*files: Path | None, plot: Path | None = None) -> None:
    """Raise UserError if a file cannot be written where it is to be, or `plot` has the suffix of no chart format."""
    for file in (*files, plot):
        if file is not None:
            check_output_file(file, "the output")
    if plot is not None and plot.suffix.lower() not in CHARTS:
        raise UserError(f"--plot is {plot}; its name must end in .png, .svg or .pdf")


def write_outputs(results: Any, *outputs: tuple[Path | None, Callable[[Any, Path], None]]) -> None:
    """Write `results` to each file that is given, by the function beside it."""
    for file, write in outputs:
        if file is not None:
            write(results, file)
            log(f"wrote {file}")


def log_default_model(model: str | None) -> None:
    """Log that the packaged model is used if `model` is not given."""
    if model is None:
        log("no --model given: using the demo model that ships with tnllm")
