"""The `tnllm` command: registers one file per command and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 run-time failure, 2 bad input or config, 3 missing extra, 4 a result that failed its own check,
130 Ctrl-C, 143 after a SIGTERM that saved.
"""

import errno
import importlib
import io
import os
import select
import sys
from typing import Any, NoReturn

import typer

from tnllm import __version__, interrupts
from tnllm.cli.options import HAS_BOXES, Group, examples
from tnllm.errors import UserError

# Panels of `tnllm --help`, and in each the order people meet the commands. A module offers `command` (a function) or
# `app` (a group of functions).
PANELS = {
    "Model": ("train", "generate", "serve", "eval", "convert", "sweep"),
    "Data": ("data", "tokenizer"),
    "Find and check": ("recipes", "estimate", "doctor", "plot"),
    "Measure": ("bench-attn", "bench-train", "bench-scale", "bench-decode", "bench-eval", "bench-serve"),
}


class _InOrder(Group):
    """Lists the commands as PANELS does; Typer would put groups behind single commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in PANELS.values() for name in names]


app = typer.Typer(
    name="tnllm",
    cls=_InOrder,
    help="Train, evaluate and serve TransNormerLLM, the linear-attention large language model.",
    epilog=examples("tnllm generate --prompt 'Once upon a time'", "tnllm train tiny", "tnllm recipes list"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if HAS_BOXES else None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"tnllm {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", callback=_show_version, is_eager=True
    ),
    # `main` takes it away, at any place of the command line; it is here for --help.
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; may stand anywhere."),
) -> None:
    pass


for _panel, _names in PANELS.items():
    for _name in _names:
        _module = importlib.import_module(f"tnllm.cli.{_name.replace('-', '_')}")
        if hasattr(_module, "app"):
            app.add_typer(_module.app, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, epilog=_module.EPILOG, rich_help_panel=_panel)(_module.command)


def _normalize(args: list[str]) -> list[str]:
    """Accept `--max_tokens` for `--max-tokens`; values and everything after a lone `--` stay as they are."""
    end = args.index("--") if "--" in args else len(args)
    flags = [
        "=".join([arg.split("=", 1)[0].replace("_", "-"), *arg.split("=", 1)[1:]]) if arg.startswith("--") else arg
        for arg in args[:end]
    ]
    return flags + args[end:]


def _fail(message: str, code: int) -> NoReturn:
    print(f"tnllm: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _prepare_streams() -> None:
    """A closed stream (`>&-`) becomes the null device, and a character that stdout cannot encode is replaced."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open until the process ends.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class _Stdout:
    """Our stdout as it is at the start of a block; rich replaces descriptor 1 when its reader is gone."""

    def __enter__(self) -> "_Stdout":
        try:
            self._copy: int | None = os.dup(1)
            self._has_stderr = os.path.sameopenfile(1, 2)
        except OSError:
            self._copy, self._has_stderr = None, False
        return self

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            os.close(self._copy)

    def is_abandoned(self, error: BaseException | None) -> bool:
        """Whether `error` says that a pipe has no reader, and that pipe is our stdout (`tnllm ... | head`)."""
        if not isinstance(error, OSError) or error.errno != errno.EPIPE or self._copy is None:
            return False
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self._copy, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

    def leave(self) -> NoReturn:
        """End without an error. What is still buffered goes nowhere, so that the interpreter's exit is silent."""
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2) if self._has_stderr else (1,):
            os.dup2(null, descriptor)
        sys.exit(0)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. `--debug` anywhere shows the traceback of an error."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    _prepare_streams()
    with _Stdout() as stdout:
        _run(args, debug, stdout)


def _run(args: list[str], debug: bool, stdout: _Stdout) -> NoReturn:
    try:
        with interrupts.raised():
            result = app(
                _normalize([arg for arg in args if arg != "--debug"]), prog_name="tnllm", standalone_mode=False
            )
            if result == interrupts.EXIT_CODE:
                # Typer turns Ctrl-C into this result instead of raising it.
                raise KeyboardInterrupt
            sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        _fail(interrupts.LINE, interrupts.EXIT_CODE)
    except SystemExit as stop:
        # Click and rich turn a closed pipe into an exit with 1.
        if stop.code and stdout.is_abandoned(stop.__context__):
            stdout.leave()
        raise
    except OSError as error:
        if stdout.is_abandoned(error):
            stdout.leave()
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        advice = "; free some space and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _fail(f"{error.strerror or error}{where}{advice}", 1)
    except Exception as error:
        # Usage errors of the option parser carry an exit code and a message; the rest are bugs, shown with traceback.
        if debug or not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context is not None else ""
        message = error.format_message() or "a command is missing"
        _fail(f"{message}{hint}", getattr(error, "exit_code", 2))
