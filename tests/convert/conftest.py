"""Shared by the tests of conversion."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tnllm.convert import hf_folder
from tnllm.convert.run import Options, Report, convert


@pytest.fixture
def run() -> Callable[..., Report]:
    """Convert; `said` collects the lines for people."""

    def call(source: Path, target: Path, to: str, said: list[str] | None = None, **options) -> Report:
        return convert(
            source, target, Options(to=to, **options), ([] if said is None else said).append, lambda *_: None
        )

    return call


@pytest.fixture(scope="session")
def hf_code(tmp_path_factory) -> Iterator[ModuleType]:
    """The Python files of a Hugging Face folder, imported."""
    folder = tmp_path_factory.mktemp("code")
    for name, text in hf_folder.code_files().items():
        (folder / name).write_text(text)
    with hf_folder.imported_code(folder) as code:
        yield code
