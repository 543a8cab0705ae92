"""Shared by the tests of conversion."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tnllm.convert.run import Options, Report, convert


@pytest.fixture
def run() -> Callable[..., Report]:
    """Convert; `said` collects the lines for people."""

    def call(source: Path, target: Path, to: str, said: list[str] | None = None, **options) -> Report:
        return convert(source, target, Options(to=to, **options), (said or []).append, lambda *_: None)

    return call
