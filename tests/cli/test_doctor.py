"""`tnllm doctor` on a good installation and on broken ones."""

import builtins
import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tnllm import assets
from tnllm.cli import doctor

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def report(out: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_a_good_installation(tnllm: Run) -> None:
    code, out, err = tnllm("doctor", "--json")
    assert (code, err) == (0, "")
    checks = report(out)
    assert {check["status"] for check in checks.values()} <= {"ok", "note"}
    assert set(checks) >= {"python", "torch", "disk", "assets", "recipes", "attention, cpu", "extra plot"}
    for extra, packages in doctor.EXTRAS.items():
        complete = all(find_spec(name) for name in packages)
        assert checks[f"extra {extra}"]["status"] == ("ok" if complete else "note")
        assert checks[f"extra {extra}"]["remedy"] == ("" if complete else f"pip install 'tnllm[{extra}]'")


def test_the_path_of_each_kernel(tnllm: Run) -> None:
    launch = pytest.importorskip("tnllm.kernels.lightning_attention.launch")
    checks = report(tnllm("doctor", "--json")[1])
    assert checks["kernels, cpu"]["found"].startswith("plain torch")
    assert "unset TRITON_INTERPRET" in checks["kernels, Triton"]["remedy"]  # set for these tests

    def paths(shared_memory: int, has_tma: bool) -> dict[str, str]:
        rows = doctor._gpu_kernels("cuda:0", launch.Device(100, shared_memory, has_tma))
        return {row.name.removesuffix(", cuda:0"): row.found for row in rows}

    hopper, small = paths(232448, True), paths(101376, False)
    assert "at head dim 128: chunks of 64, stages 4, dk and dv by tensor memory accelerator" in hopper["attention"]
    assert "persistent Triton kernel, bulk prefetch" in hopper["decoding"]
    assert "at head dim 128: chunks of 64, stages 1, dk and dv by pointers" in small["attention"]
    assert small["attention in fp32"].endswith("256: none: too little shared memory")
    assert "no bulk prefetch" in small["decoding"]


def test_table(tnllm: Run) -> None:
    code, out, _ = tnllm("doctor")
    assert code == 0
    assert "of its definition" in out and "hashes as packaged" in out


def test_every_extra_and_requirement_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    names = {doctor._DISTRIBUTIONS.get(name, name) for name in [*doctor.REQUIRED, "triton"]}
    assert names == {line.split(">")[0] for line in project["dependencies"]}
    for extra, packages in doctor.EXTRAS.items():
        wanted = {line.split(">")[0] for line in project["optional-dependencies"][extra]}
        assert {doctor._DISTRIBUTIONS.get(name, name) for name in packages} == wanted


def test_hashes_cover_every_packaged_file() -> None:
    folder = assets.folder()
    files = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and file.name != "SHA256SUMS"
    }
    listed = dict(reversed(line.split(maxsplit=1)) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert listed == files, "renew the list; docs/recipes.md says how"


def test_damaged_and_missing_files_are_named(tnllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(assets.folder(), tmp_path / "assets")
    monkeypatch.setattr(assets, "folder", lambda: tmp_path / "assets")
    (tmp_path / "assets" / "NOTICE").unlink()
    with open(tmp_path / "assets" / "tokenizer.model", "r+b") as file:
        file.write(b"x")
    code, out, err = tnllm("doctor", "--json")
    assert code == 1
    assert report(out)["assets"]["found"] == "NOTICE is missing, tokenizer.model is damaged"
    assert err.startswith("tnllm: not usable: assets: NOTICE is missing") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ImportError("no such file"), OSError("libcudart.so: cannot open")])
def test_a_package_that_does_not_import_is_reported(
    tnllm: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(name: str) -> object:
        if name == "torch":
            raise error
        return real(name)

    real = doctor.importlib.import_module
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    code, out, err = tnllm("doctor", "--json")
    assert code == 1
    checks = report(out)
    assert checks["torch"]["status"] == "wrong" and str(error) in checks["torch"]["found"]
    assert "torch" in checks["torch"]["remedy"]
    assert "cuda" not in checks and "recipes" in checks
    assert err.startswith("tnllm: not usable: torch: ")


def test_the_report_goes_on_when_the_kernels_cannot_be_imported(tnllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name == "tnllm.kernels.lightning_attention":
            raise ImportError("undefined symbol: x")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)
    code, out, _ = tnllm("doctor", "--json")
    assert code == 1
    assert report(out)["attention"]["found"] == "ImportError: undefined symbol: x"


def test_wrong_attention_is_found(tnllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import tnllm.kernels.lightning_attention as attention

    right = attention.lightning_attention
    monkeypatch.setattr(attention, "lightning_attention", lambda q, k, v, g: right(q, k, v, g * 1.01))
    code, out, _ = tnllm("doctor", "--json")
    assert code == 1
    assert report(out)["attention, cpu"]["status"] == "wrong"
