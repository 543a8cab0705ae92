"""Checks of the files a command will write, before it works for minutes."""

from pathlib import Path

from tnllm.errors import UserError

CHARTS = (".png", ".svg", ".pdf")


def check_outputs(*files: Path | None, plot: Path | None = None) -> None:
    """Raise UserError where there is no folder to write a file into, or no chart is written as `plot` is named."""
    for file in (*files, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"there is no folder {file.parent} to write {file.name} into; make it first")
    if plot is not None and plot.suffix.lower() not in CHARTS:
        raise UserError(f"--plot is {plot}; its name must end in .png, .svg or .pdf")
