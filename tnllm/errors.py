"""Errors meant for a person: one clear line that says what was given, what is allowed and what to do next.

    raise UserError(f"model.kind is {kind!r}; allowed: transnormer, transformer")

The command line prints the message without a traceback and exits with `exit_code`.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Longer messages are cut in the middle: what is wrong comes first, what to do and where it was given last.
_MOST_CHARACTERS = 1000


class UserError(Exception):
    """Bad input or configuration. The message is one line, whatever the input was that it quotes."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        half = _MOST_CHARACTERS // 2 - 3
        super().__init__(text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}")


class RunError(UserError):
    """The input was fine, but the run failed: a full disk, a non-finite loss, a corrupt file."""

    exit_code = 1


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    exit_code = 3

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"this needs {package}, which is not installed; run: pip install 'tnllm[{extra}]'")


@contextmanager
def optional_import(extra: str, package: str) -> Iterator[None]:
    """Around the import of an optional dependency: MissingExtra where it is not installed."""
    try:
        yield
    except ImportError:
        raise MissingExtra(extra, package) from None


class CheckFailed(UserError):
    """The result was made and does not compute what its source computes; it was thrown away."""

    exit_code = 4


class Terminated(UserError):
    """A SIGTERM arrived and everything was saved."""

    exit_code = 143


def did_you_mean(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `"; did you mean 'x'?"` for the allowed word nearest to `word`, in any case, or an empty string.

    cutoff: similarity from which a word is near, 0 to 1.
    """
    # The comparison takes quadratic time, and names are short.
    names = {name.lower(): name for name in allowed} if len(word) <= 64 else {}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
