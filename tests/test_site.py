"""The documentation builds as a site: every link and anchor leads somewhere, and the commands' page is complete."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tnllm.cli.main import app

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "site.py"


def load_script():
    spec = importlib.util.spec_from_file_location("site_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds_with_every_link_checked():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "build" / "site"
    assert "Lightning Attention" in (site / "index.html").read_text(encoding="utf-8")
    assert "cu_seqlens" in (site / "python" / "index.html").read_text(encoding="utf-8")


def test_links_follow_the_pages_into_the_site():
    script = load_script()
    text = (
        "[a](docs/data.md#x) [b](CONTRIBUTING.md) [c](tnllm/assets/NOTICE) [d](https://e.org/f) ![p](docs/images/s.png)"
    )
    assert script._with_site_links(text, Path(".")) == (
        "[a](data.md#x) [b](contributing.md) c (`tnllm/assets/NOTICE`) [d](https://e.org/f) ![p](images/s.png)"
    )
    inside = script._with_site_links("[a](../data.md) [b](../../README.md) [c](x.png)", Path("docs/benchmarks"))
    assert inside == "[a](../data.md) [b](../index.md) [c](../benchmarks/x.png)"


def test_the_page_of_commands_names_every_option():
    page = load_script().commands_page()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"\n## tnllm {name}\n" in page
        for inner in [command, *getattr(command, "commands", {}).values()]:
            missing = [option for parameter in inner.params for option in parameter.opts[:1] if option[:2] == "--"]
            assert all(f"`{option}`" in page for option in missing)
