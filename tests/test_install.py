"""What `make demo` and `make install` choose to install, with and without a GPU, uv and a network."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tnllm import __version__

SCRIPT = Path(__file__).parent.parent / "scripts" / "install.py"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """The only folder on PATH; returns a function that puts a program there."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def add(name: str, output: str, code: int = 0) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        path.chmod(0o755)

    return add


def load_script():
    spec = importlib.util.spec_from_file_location("install_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(monkeypatch, extra="", cpu_index=True, pip_indexes=False):
    script = load_script()
    monkeypatch.setattr(script, "reachable", lambda url: cpu_index)
    monkeypatch.setattr(script, "pip_has_indexes", lambda python: pip_indexes)
    commands, notes = script.plan(extra)
    return " ".join(commands[-1]), "; ".join(notes)


def test_without_a_gpu_the_cpu_build(tools, monkeypatch):
    command, notes = planned(monkeypatch)
    assert "-m pip install" in command and "--extra-index-url https://download.pytorch.org/whl/cpu" in command
    assert "no NVIDIA GPU is here" in notes and "GB to download" in notes
    assert "[dev]" not in command and "[dev]" in planned(monkeypatch, "dev")[0]


def test_a_cpu_index_that_does_not_answer_is_left_out(tools, monkeypatch):
    command, notes = planned(monkeypatch, cpu_index=False)
    assert "--extra-index-url" not in command and "does not answer" in notes


def test_with_a_gpu_the_default_build(tools, monkeypatch):
    tools("nvidia-smi", "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)")
    command, notes = planned(monkeypatch)
    assert "--extra-index-url" not in command and "torch with CUDA" in notes


@pytest.mark.parametrize(("output", "code"), [("No devices were found", 0), ("NVIDIA-SMI has failed", 9)])
def test_a_driver_without_a_card_is_no_gpu(tools, monkeypatch, output, code):
    tools("nvidia-smi", output, code)
    assert "no NVIDIA GPU is here" in planned(monkeypatch)[1]


def test_uv_installs_where_it_is_unless_pip_alone_knows_the_indexes(tools, monkeypatch):
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name[:3] != "UV_"})
    tools("uv", "uv 0.9")
    command, notes = planned(monkeypatch)
    assert "uv pip install" in command and "--torch-backend cpu" in command and "installing with" in notes
    command, notes = planned(monkeypatch, pip_indexes=True)
    assert "-m pip install" in command and "pip, not uv" in notes
    tools("nvidia-smi", "GPU 0: NVIDIA A100")
    assert "--torch-backend" not in planned(monkeypatch)[0]


def test_dry_run_prints_the_commands_and_runs_none(tools, tmp_path):
    # A proxy that refuses: no network, whatever the machine has.
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--extra", "dev"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "install: no NVIDIA GPU is here: the CPU build of torch"
    assert lines[-2].endswith(".venv") and " -m venv " in lines[-2]
    assert "--constraint" in lines[-1] and "[dev]" in lines[-1]
    assert "done in" not in done.stdout


def test_pip_shows_large_downloads_and_its_errors(monkeypatch, capsys, tmp_path):
    """A stand-in for pip that prints what pip prints."""
    script = load_script()
    fake = tmp_path / "pip.py"
    fake.write_text(
        "import sys\n"
        "if '--version' in sys.argv: print('pip 26.1 from x'); sys.exit()\n"
        "assert '--progress-bar' in sys.argv\n"
        "print('Collecting torch')\n"
        "print('Downloading small-1.0-py3-none-any.whl (12.3 kB)')\n"
        "print('Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (191.5 MB)')\n"
        "print('Progress 1000 of 191500000')\n"
        "print('Installing collected packages: a, b, c')\n"
        "print('ERROR: no space left')\n"
        "sys.exit(7)\n"
    )
    # `python -m pip` becomes `python -u fake`: three words before the arguments, as in the real command.
    assert script.run_pip([sys.executable, "-u", str(fake), "install"]) == 7
    output = capsys.readouterr()
    assert output.out.splitlines() == ["  torch: 191.5 MB", "  unpacking 3 packages"]
    assert "ERROR: no space left" in output.err


def test_the_version_stands_in_one_place():
    """pyproject.toml reads it; the citation names the same, and the changelog has a section for it."""
    root = SCRIPT.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert f"\nversion: {__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {__version__}" in (root / "CHANGELOG.md").read_text()
