"""`tnllm plot`: a chart of a run, or of several to compare."""

from enum import StrEnum
from pathlib import Path

import typer

from tnllm.cli.options import examples

EPILOG = examples("tnllm plot runs/tiny runs/tiny-transformer -o loss.png --x tokens")
X = StrEnum("X", {"step": "step", "tokens": "tokens", "time": "time"})


def command(
    runs: list[Path] = typer.Argument(help="Run folders, or metrics.jsonl files."),
    output: Path = typer.Option(Path("loss.png"), "--output", "-o", help="File to write: .png, .pdf or .svg."),
    x: X = typer.Option(X.step, help="What the x axis counts."),
    smooth: int | None = typer.Option(None, min=0, help="Rows the loss is smoothed over; 0: none. Default: by length."),
) -> None:
    """Draw loss (raw, smoothed, validation), learning rate and tokens/s of runs. Needs the extra `plot`."""
    from tnllm.errors import UserError, did_you_mean
    from tnllm.files import check_output_file, write_bytes_atomic
    from tnllm.training.plot import FORMATS, draw, read_run

    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        hint = did_you_mean(suffix, FORMATS)
        raise UserError(f"--output is {output}; its name must end in {', '.join(FORMATS)}{hint}")
    check_output_file(output, "--output", runs)
    picture = draw([read_run(path) for path in runs], x.value, suffix, smooth)
    write_bytes_atomic(output, picture)
    print(output)
