"""The `tnllm` command: registers one file per command and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 run-time failure, 2 bad input or config, 3 missing extra, 4 a result that failed its own check,
130 Ctrl-C, 143 after a SIGTERM that saved.
"""

import importlib
import os
import sys
from typing import NoReturn

import typer

from tnllm import __version__
from tnllm.errors import UserError

# In the order people meet them. A module offers `command` (a function) or `app` (a group of functions).
COMMANDS = (
    "train",
    "sweep",
    "generate",
    "serve",
    "eval",
    "convert",
    "data",
    "tokenizer",
    "recipes",
    "estimate",
    "doctor",
    "plot",
    "bench-attn",
    "bench-norm",
    "bench-train",
    "bench-scale",
    "bench-decode",
    "bench-stream",
    "bench-eval",
    "bench-serve",
)

app = typer.Typer(
    name="tnllm",
    help="Train, evaluate and serve TransNormerLLM, the linear-attention large language model.",
    epilog="Start with:  tnllm generate --prompt 'Once upon a time'   |   tnllm train recipes/tiny.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
) -> None:
    pass


for _name in COMMANDS:
    _module = importlib.import_module(f"tnllm.cli.{_name.replace('-', '_')}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name, epilog=_module.EPILOG)(_module.command)


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


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. `--debug` anywhere shows the traceback of an error."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    try:
        result = app(_normalize([arg for arg in args if arg != "--debug"]), prog_name="tnllm", standalone_mode=False)
        if result == 130:
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
        _fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:
        # The reader of our output closed the pipe (`tnllm ... | head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 1)
    except Exception as error:
        # Usage errors of the option parser carry an exit code and a message; the rest are bugs, shown with traceback.
        if debug or not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context is not None else ""
        message = error.format_message() or "a command is missing"
        _fail(f"{message}{hint}", getattr(error, "exit_code", 2))
