"""The documentation builds as a site: links lead somewhere, tables fit the screen, the page of commands is complete."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from filelock import FileLock

from tests.serving import chromium
from tnllm.cli.main import app

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "site.py"
EXECUTABLE = chromium.find()


def load_script():
    spec = importlib.util.spec_from_file_location("site_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Another worker may be building it too, in the same folder."""
    folder = tmp_path_factory.mktemp("site") / "site"
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "site.lock"):
        done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.copytree(ROOT / "build" / "site", folder)
    return folder


@pytest.mark.slow
def test_the_site_builds_with_every_link_checked(site):
    assert "Lightning Attention" in (site / "index.html").read_text(encoding="utf-8")
    assert "cu_seqlens" in (site / "python" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on PATH; on Debian: apt-get install chromium")
def test_commands_in_tables_are_not_broken_on_a_phone_or_a_laptop(site):
    with chromium.Browser(EXECUTABLE) as browser:
        for name in ("", "which-command/", "commands/"):
            for width in (375, 1280):
                page = browser.open((site / name / "index.html").as_uri(), width, 800, phone=width == 375)
                broken = page.evaluate(
                    "[...document.querySelectorAll('.md-typeset table code')]"
                    ".filter(e => e.getClientRects().length > 1).map(e => e.textContent)"
                )
                assert not broken, (name, width)
                # A wide table scrolls by itself; the page does not.
                assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_links_follow_the_pages_into_the_site():
    script = load_script()
    text = (
        "[a](docs/data.md#x) [b](CONTRIBUTING.md) [c](tnllm/assets/NOTICE) [d](https://e.org/f) ![p](docs/images/s.png)"
    )
    assert script._with_site_links(text, Path(".")) == (
        "[a](data.md#x) [b](contributing.md) c (`tnllm/assets/NOTICE`) [d](https://e.org/f) ![p](images/s.png)"
    )
    # GitHub shows a bar for \\| in a table's code, Python's Markdown the backslash too.
    assert script._with_site_links("| `a\\|b <c>` | d |", Path(".")) == "| <code>a&#124;b &lt;c&gt;</code> | d |"
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


def test_the_page_of_installation_names_every_extra():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("## Extras")[2]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", page, re.M)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(named) == sorted(project["optional-dependencies"])
