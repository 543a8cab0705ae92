"""Shared by the tests of commands."""

from collections.abc import Callable

import pytest

from tnllm.cli.main import main


@pytest.fixture
def tnllm(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        return (end.value.code, *capsys.readouterr())

    return run
