"""The package imports where POSIX modules do not exist."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("data", "cleaning", "training")
    for path in sorted((ROOT / "tnllm" / folder).glob("[!_]*.py"))
]


@pytest.mark.slow
def test_without_fcntl():
    pytest.importorskip("datatrove")
    # datatrove knows how to do without; torch is imported first, since its own code is not in question.
    code = "import sys, torch, datatrove.executor, datatrove.data\nsys.modules['fcntl'] = None\n"
    code += "sys.modules['resource'] = None\nimport " + ", ".join(MODULES)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
