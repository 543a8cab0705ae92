"""Values of options, checked before a command works for minutes: lengths, choices, lists, files to write and the device."""

import os
import shutil
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import typer
import typer.core

from tnllm.errors import UserError
from tnllm.files import check_output_file
from tnllm.progress import log

CHARTS = (".png", ".svg", ".pdf")
# Help is plain text in a pipe, and in a terminal where the columns of a box would cut the names of options.
HAS_BOXES = os.isatty(1) and shutil.get_terminal_size().columns >= 60
# Options that several commands share.
AS_JSON = typer.Option(False, "--json", help="Print JSON.")
BATCH_TOKENS = typer.Option(None, min=1, help="Most tokens computed together. Default: 4096 on CPU, 32768 on a GPU.")
CORPUS = typer.Argument(help="Text, JSON Lines, parquet or WARC files, folders or URLs of them, or sample.")
CSV_FILE = typer.Option(None, "--csv", help="Write the rows as CSV.")
DATA_DIR = typer.Option(None, help="Folder of evaluation sets. Default: the samples that ship with tnllm.")
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")
DTYPE = typer.Option("auto", help="Of the weights: auto (float32 on CPU), float32, bfloat16, or on a CPU int8.")
FIELD = typer.Option("text", help="Field or column that holds the text.")
ID_FIELD = typer.Option("id", help="Field that names a document; without it file:line does.")
INCLUDE_PATH = typer.Option(None, help="Folder of your own tasks, as YAML of lm-evaluation-harness.")
JSON_FILE = typer.Option(None, "--json", help="Write every figure as JSON.")
LIMIT = typer.Option(None, min=1, help="Only the first N questions of each task (of each subject).")
MAX_MINUTES = typer.Option(
    None,
    min=0.0,
    help="Minutes for all measurements: what is forecast not to fit is extrapolated or skipped, and named. "
    "Default 1 on a CPU (bench-scale: 5), 60 on a GPU.",
)
MODEL = typer.Option(None, help="Run, step or weights folder, or hf://ORG/NAME. Default: the model that ships.")
NUM_FEWSHOT = typer.Option(None, "--num-fewshot", "-n", min=0, help="Examples before a question. Default: the task's.")
OUT = typer.Option(..., "--out", "-o", help="Folder for the result; run again to resume after a stop.")
OVERWRITE = typer.Option(False, "--overwrite", help="Start over if the folder holds other results.")
PLOT = typer.Option(None, "--plot", help="Write a chart (png, svg or pdf).")
RECIPE = typer.Argument(help="A recipe file, or the name of one that ships (`tnllm recipes list`).")
SETS = typer.Option([], "--set", help="Change a key: --set section.key=value. Repeatable.")
SOFTMAX_EVERY = typer.Option(0, min=0, help="Every Nth layer of TransNormerLLM has softmax attention; 0: none.")
OnError = StrEnum("OnError", {"stop": "stop", "skip": "skip"})
TOKENIZER = typer.Option(None, help="tokenizer.model, its folder, tnllm-8k or tnllm-64k. Default: tnllm-8k.")


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options below one heading of a command's help."""
    return partial(typer.Option, rich_help_panel=title)


def examples(*commands: str) -> str:
    """The end of a command's help: each of `commands` on a line of its own."""
    # In boxes Typer joins lines, and only an empty one between them ends a line; in plain text \b keeps all of them.
    return "\n\n".join(["Examples:", *commands]) if HAS_BOXES else "\n".join(["\b", "Examples:", *commands])


class Group(typer.core.TyperGroup):
    """A group whose plain help has panels too, and says of each command what boxes say; Typer's would cut it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.commands[name]
            rows = panels.setdefault(command.rich_help_panel or "Commands", [])
            rows.append((name, (command.help or "").partition("\n\n")[0]))
        for panel_, rows in panels.items():
            with formatter.section(panel_):
                formatter.write_dl(rows)


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
