"""What a release writes about the project's address: README's links work on a package index, the metadata has URLs."""

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import yaml
from setuptools import build_meta

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "address.py"
ADDRESS, TAG = "https://example.org/org/tnllm", "v1.2.3"


def load_script():
    spec = importlib.util.spec_from_file_location("address_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_to_files_become_addresses_and_the_rest_stays():
    text = "[a](docs/x.md#y) ![b](docs/p.png) [c](https://e.org) [d](#here) [e](mailto:a@e.org)"
    assert load_script().absolute_links(text, ADDRESS, TAG) == (
        f"[a]({ADDRESS}/blob/{TAG}/docs/x.md#y) ![b]({ADDRESS}/raw/{TAG}/docs/p.png) [c](https://e.org) [d](#here) "
        "[e](mailto:a@e.org)"
    )


def test_the_package_of_a_release_has_urls_and_a_readme_whose_links_lead_somewhere(tmp_path, monkeypatch):
    names = ("README.md", "pyproject.toml", "CITATION.cff", "LICENSE", "tnllm/__init__.py", "tnllm/py.typed")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    load_script().write_address(tmp_path, ADDRESS, TAG)

    # What a package index shows is the metadata's text; both kinds of links are looked for without the script's pattern.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "out").mkdir()
    info = build_meta.prepare_metadata_for_build_wheel(str(tmp_path / "out"))
    metadata = (tmp_path / "out" / info / "METADATA").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert len(links) > 30 and all(link.startswith(("https://", "#")) for link in links)
    ours = [link.removeprefix(ADDRESS).split("/", 3) for link in links if link.startswith(ADDRESS)]
    assert {(kind, tag) for _, kind, tag, _ in ours} == {("blob", TAG), ("raw", TAG)}
    missing = [path for *_, path in ours if not (ROOT / path.split("#")[0]).exists()]
    assert not missing
    for name in ("Homepage", "Documentation", "Changelog", "Issues"):
        assert f"Project-URL: {name}, {ADDRESS}" in metadata
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]["Issues"] == f"{ADDRESS}/issues"
    assert yaml.safe_load((tmp_path / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"] == ADDRESS
