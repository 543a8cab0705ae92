"""Set up .venv: which torch, with which installer, how large it is, and how far it got. Needs Python's own library only.

    python3 scripts/install.py                  what running needs
    python3 scripts/install.py --extra dev      and what the tests need
    python3 scripts/install.py --dry-run        print the commands, run nothing

A machine without an NVIDIA GPU gets the CPU build of torch, if its index can be reached: the default build brings
gigabytes of CUDA libraries along. uv installs where there is one; pip otherwise, and where pip alone is told of indexes.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# To download, and on disk where it was measured: versions of constraints.txt, Linux x86-64, 2026-11-27.
SIZES = {
    ("cpu", ""): "about 0.5 GB to download, 2.5 GB on disk",
    ("cpu", "dev"): "about 0.6 GB to download, 3 GB on disk",
    ("gpu", ""): "about 2.9 GB to download (torch brings CUDA along)",
    ("gpu", "dev"): "about 3 GB to download (torch brings CUDA along)",
}
MIN_PYTHON = (3, 11)
# Wheels below this size are downloaded before a line about them would be read.
LARGE_MB = 10.0


def has_gpu():
    """Whether `nvidia-smi -L` names a GPU: a driver without a card does not count."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def reachable(url, timeout_s=5.0):
    """Whether `url` answers."""
    try:
        request = urllib.request.Request(url + "/torch/", method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except OSError:
        return False


def pip_has_indexes(python):
    """Whether pip was told of indexes or folders of its own, which uv does not read."""
    names = ("index-url", "extra-index-url", "find-links")
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return any(f".{name}=" in line for line in listed.stdout.splitlines() for name in names)


def plan(extra):
    """The commands that set up .venv, and lines that say why they are these."""
    gpu = has_gpu()
    notes = ["an NVIDIA GPU is here: torch with CUDA" if gpu else "no NVIDIA GPU is here: the CPU build of torch"]
    wants_cpu = not gpu and sys.platform == "linux"
    uv = shutil.which("uv")
    if uv and pip_has_indexes(sys.executable) and not any(name.startswith("UV_") for name in os.environ):
        notes.append("pip, not uv: pip's configuration names indexes that uv would not read")
        uv = None
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    target = ["--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[{extra}]" if extra else str(ROOT)]
    if uv:
        notes.append(f"installing with {uv}")
        backend = ["--torch-backend", "cpu"] if wants_cpu else []
        return [
            [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(VENV)],
            [uv, "pip", "install", "--python", str(python), *backend, *target],
        ], [*notes, f"{SIZES['gpu' if gpu else 'cpu', extra]}"]
    index = []
    if wants_cpu and reachable(CPU_INDEX):
        index = ["--extra-index-url", CPU_INDEX]
    elif wants_cpu:
        notes.append(f"{CPU_INDEX} does not answer: pip takes the torch that it finds")
    return [
        [sys.executable, "-m", "venv", str(VENV)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *index, *target],
    ], [*notes, f"{SIZES['gpu' if gpu else 'cpu', extra]}"]


def run_pip(command):
    """Run pip and show its large downloads with how far they are; all of its output only if it fails."""
    version = subprocess.run([*command[:3], "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    # "Progress 1234 of 56789" a line, for programs; older pips say nothing through a pipe.
    raw = ["--progress-bar", "raw"] if tuple(map(int, version.split(".")[:2])) >= (24, 1) else []
    process = subprocess.Popen([*command, *raw], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, name, shown = [], "", time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        line = line.strip()
        progress = re.match(r"Progress (\d+) of (\d+)", line)
        if progress:
            done, total = (int(number) / 1e6 for number in progress.groups())
            if total >= LARGE_MB and name and time.monotonic() - shown > 3:
                print(f"  {name}: {done:.0f} of {total:.0f} MB", flush=True)
                shown = time.monotonic()
            continue
        lines.append(line)
        wheel = re.match(r"Downloading (?:\S*/)?([\w.]+)-[^ ]* \(([\d.]+) ([kMG]B)\)", line)
        if wheel:
            name = wheel[1]
            if float(wheel[2]) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[wheel[3]] >= LARGE_MB:
                print(f"  {name}: {wheel[2]} {wheel[3]}", flush=True)
                shown = time.monotonic()
        elif line.startswith("Installing collected packages"):
            print(f"  unpacking {line.count(',') + 1} packages", flush=True)
    if process.wait():
        print("\n".join(lines[-30:]), file=sys.stderr)
    return process.returncode


def main():
    parser = argparse.ArgumentParser(description="Set up .venv with tnllm in it.")
    parser.add_argument("--extra", default="", choices=["", "dev"], help="dev: what the tests need as well")
    parser.add_argument("--dry-run", action="store_true", help="print the choice and the commands; run nothing")
    options = parser.parse_args()
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        found = platform.python_version()
        print(f"this is Python {found}; tnllm needs {wanted} or newer: make PYTHON=python{wanted} ...", file=sys.stderr)
        return 2
    commands, notes = plan(options.extra)
    print("\n".join(f"install: {note}" for note in notes), flush=True)
    began = time.monotonic()
    for command in commands:
        if options.dry_run:
            print(shlex.join(command))
            continue
        code = (
            run_pip(command)
            if "pip" in command and "-m" in command
            else subprocess.run(command, check=False).returncode
        )
        if code:
            print(f"install: failed ({code}): {shlex.join(command)}", file=sys.stderr)
            return code
    if not options.dry_run:
        print(f"install: done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
