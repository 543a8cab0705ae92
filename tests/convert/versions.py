"""Runs the tests of the exported model with other versions of transformers, each in an environment of its own.

    python -m tests.convert.versions                    # the oldest and the newest version that are claimed
    python -m tests.convert.versions 4.57.1 5.20.0

Downloads about 20 MB per version from the package index; torch and the rest come from the environment it is run in. Prints
one line per version. Exit code 1 if a test fails, 3 without network.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

OLDEST, NEWEST = "4.51.3", "5.24.0"
# What transformers 4 needs in place of newer versions that are installed here.
_OLD = ["tokenizers<0.22", "huggingface_hub<1", "datasets==3.6.0"]


def main(versions: list[str]) -> int:
    failed = False
    for version in versions or [OLDEST, NEWEST]:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin/python"
            # What is not installed there comes from here.
            inside = sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder})
            (Path(inside) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
            packages = [f"transformers=={version}", *(_OLD if version.startswith("4.") else [])]
            pip = subprocess.run(
                [python, "-m", "pip", "install", "-q", "--no-deps", *packages], capture_output=True, text=True
            )
            if pip.returncode:
                print(f"transformers {version} could not be installed: {pip.stderr.strip().splitlines()[-1]}")
                return 3
            tests = subprocess.run(
                [python, "-m", "pytest", "tests/convert/test_callers.py"],
                capture_output=True, text=True, env={**os.environ, "HF_HOME": f"{folder}/home"},
            )  # fmt: skip
            print(f"transformers {version}: {tests.stdout.strip().splitlines()[-1]}", flush=True)
            if tests.returncode:
                failed = True
                print(tests.stdout, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
