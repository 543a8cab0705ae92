"""Runs the commands that README, docs/ and `--help` show, from the built wheel, in a folder with what a reader would have.

    python -m tests.commands                # all of them, with the long ones
    python -m tests.commands first-model    # those of one page; `help` for the examples of --help
    python -m tests.commands "help eval"    # the examples of one command or group
    python -m tests.commands demo           # README's demo, all 400 steps, and whether README shows its losses

A fenced block is run if the line above it is `<!-- runs -->`, or `<!-- runs, minutes -->`, which the tests leave out. Where
lines of it begin with `$ `, these are the commands and the others what they print. The blocks of a page run in order, in
one folder. Every example of `--help` is run, but for those in NOT_RUN.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"^ *<!-- runs(?P<minutes>, minutes)? -->\n *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)

# Examples of --help that are not run, with the reason.
NOT_RUN = {
    "train 385m": "hours on a GPU",
    "tnllm serve": "serves until it is stopped; tests/cli/test_serve.py starts it",
    "bench-serve": "needs a server beside it",
    "convert TransNormerLLM": "needs a released checkpoint",
    "--base 385m": "needs weights of 385M parameters",
    "convert 385m": "needs weights of 385M parameters",
    "--push my-org/first": "needs an account on the hub",
    "sweep recipes/evidence": "hours on a GPU",
    "bench-train --preset": "minutes on a GPU",
    "bench-scale": "needs two GPUs",
    "bench-decode --preset 385m": "minutes on a GPU",
    "eval requests mmlu": "needs MMLU's own files",
    "bench-eval mmlu": "needs MMLU's own files",
}
# What is fast in any example of --help; the tests leave the others out.
_FAST = (
    "recipes ", "estimate ", "doctor", "eval ls", "eval compare", "tokenizer inspect", "data sample",
    "dirty-sample -o unique", "data inspect dirty-sample", "data tokenize sample",
)  # fmt: skip

# By how much a loss of README's demo may differ. On one machine all of them are equal with one thread and with two, and
# the first 125 steps also with the code of a day before. That code had printed others, up to 0.05 away, elsewhere: the CPU
# is the likely cause (sums in another order, 1e-7 at first, grown by 400 updates), but it was not known. Twice that.
DEMO_TOLERANCE = 0.1

# What readers of the pages have already: a short run, texts, prompts, scores.
PREPARE = """
tnllm train tiny --set train.max_steps=2 --out runs/tiny
cp -r runs/tiny runs/first && cp -r runs/tiny runs/second && cp -r runs/tiny runs/mine
tnllm train tiny-transformer --set train.max_steps=2 --out runs/tiny-transformer
tnllm data sample -o all
mkdir corpus web data && head -n 300 all/sample.jsonl > corpus/web.jsonl
cp corpus/web.jsonl web/a.jsonl && cp corpus/web.jsonl web.jsonl
python -c "import zstandard as z; open('web.jsonl.zst', 'wb').write(z.compress(open('web.jsonl', 'rb').read()))"
for name in book.txt sample.txt question.txt; do echo 'It was the best of times, it was the worst of times.' > $name; done
echo '{"prompt": "My dear"}' > prompts.jsonl && cp prompts.jsonl questions.jsonl
mkdir data/piqa data/openbookqa
A=$(python -c "import tnllm.assets as a; print(a.folder())")/eval && cp $A/piqa.jsonl data/piqa/dev.jsonl
A=$(python -c "import tnllm.assets as a; print(a.folder())")/eval && cp $A/openbookqa.jsonl data/openbookqa/test.jsonl
tnllm tokenizer train corpus/ --vocab-size 8000 -o my-tokenizer
tnllm data tokenize corpus/ --tokenizer my-tokenizer -o my-tokens
tnllm recipes show tiny > mine.yaml
tnllm eval --tasks piqa --limit 2 --out evals/a
cp -r evals/a evals/b && cp evals/a/*/results*.json A.json && cp A.json B.json
"""


@dataclass(frozen=True)
class Command:
    """A line for the shell, the page it is from, and whether it takes minutes."""

    page: str
    line: str
    minutes: bool


def of_page(path: Path) -> list[Command]:
    """The commands of the blocks of a page that are marked."""
    commands = []
    for block in _BLOCK.finditer(path.read_text(encoding="utf-8")):
        if block["language"] == "python":
            typed = [f"python -c {shlex.quote(block['text'])}"]
        else:
            lines = [line.strip() for line in re.sub(r"\\\n\s*", "", block["text"]).splitlines()]
            typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
            typed = [re.sub(r"\s+# .*", "", line) for line in typed if line and line[0] != "#"]
        commands += [Command(path.stem, line, bool(block["minutes"])) for line in typed]
    return commands


def of_help() -> list[Command]:
    """The examples of --help that can be run here, each once; a page is a command and what is in its group."""
    import typer

    from tnllm.cli.main import app

    group = typer.main.get_command(app)
    found: dict[str, Command] = {}
    for name, command in [("tnllm", group), *group.commands.items()]:
        inner = list(getattr(command, "commands", {}).values()) if name != "tnllm" else []
        for each in [command, *inner]:
            for line in (each.epilog or "").splitlines():
                if line.startswith(("tnllm ", "torchrun ")) and not any(part in line for part in NOT_RUN):
                    found.setdefault(line, Command(f"help {name}", line, not any(part in line for part in _FAST)))
    return list(found.values())


def build_wheel(folder: Path) -> dict[str, str]:
    """Install the wheel of this checkout into `folder`; returns the environment in which `tnllm` is that one."""
    source = folder / "source"
    # A copy: building leaves files beside the sources.
    shutil.copytree(ROOT, source, ignore=lambda path, names: {name for name in names if _beside(Path(path), name)})
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True)
    shutil.rmtree(source)
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "site"),
        "PATH": os.pathsep.join([str(folder / "site/bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }


def _beside(folder: Path, name: str) -> bool:
    return folder == ROOT and name not in {"tnllm", "recipes", "pyproject.toml", "README.md", "LICENSE"}


# Commands are forked from one process that has torch, as importing it would be most of their time; what needs a shell
# gets one.
_DRIVER = r"""
import json, os, re, shlex, sys
import torch, numpy, pydantic, tnllm.cli.main
assert tnllm.__file__.startswith(os.environ["PYTHONPATH"]), tnllm.__file__
for request in sys.stdin:
    command = json.loads(request)
    child = os.fork()
    if not child:
        os.chdir(command["folder"])
        for descriptor, name in enumerate((os.devnull, "stdout", "stderr")):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        line = command["line"]
        if not line.startswith("tnllm ") or re.search(r"[|&;<>$*~]|^\w+=", line):
            os.execvp("bash", ["bash", "-c", "set -e -o pipefail; " + line])
        sys.argv = shlex.split(line)
        try:
            tnllm.cli.main.main()
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code if isinstance(stop.code, int) else stop.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    _, status, used = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)
"""


class Shell:
    """Runs lines in the wheel's environment, each in a process of its own. Use as a context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def __enter__(self) -> "Shell":
        # Warnings of Python about forking a process with threads would be taken for the command's.
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd="/",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, line: str, folder: Path) -> tuple[int, float, str]:
        """Exit code, seconds of processor time, and all that was printed. What the line is to make is removed first."""
        made = re.findall(r" (?:-o|--out|--output|--state-out) (\S+)", line)
        made += [f"runs/{name}" for name in re.findall(r"^tnllm train ([\w-]+)$", line)]
        for name in made:
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        print(json.dumps({"line": line, "folder": str(folder)}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        code, seconds = json.loads(answer)
        printed = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stderr", "stdout")]
        return code, seconds, "".join(printed)


def prepare(shell: Shell, folder: Path) -> None:
    """Make in `folder` what the pages take for granted."""
    folder.mkdir()
    for line in PREPARE.strip().splitlines():
        code, _, printed = shell.run(line, folder)
        assert code == 0, f"{line}: {printed}"


def fresh(prepared: Path, folder: Path) -> Path:
    """A folder like `prepared`, without copying the files."""
    return Path(shutil.copytree(prepared, folder, copy_function=os.link))


def step_losses(text: str) -> list[float]:
    """The losses of a run's printed steps."""
    return [float(value) for value in re.findall(r"^step +\d+/\d+ +loss ([\d.]+)", text, re.M)]


def validation_losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step +\d+/\d+ +val_loss ([\d.]+)", text, re.M)]


def demo(shell: Shell, folder: Path) -> int:
    """Run README's demo whole, print it, and say whether README shows the same."""
    code, seconds, printed = shell.run("tnllm train tiny --out demo", folder)
    print(printed)
    shown, readme = set(), (ROOT / "README.md").read_text(encoding="utf-8")
    for read in (step_losses, validation_losses):
        ours = read(printed)
        shown |= {value for value in read(readme) if min(abs(value - other) for other in ours) > DEMO_TOLERANCE}
    print(
        f"demo: exit {code}, {seconds:.0f} s of processor time; README's that this run does not have: {sorted(shown)}"
    )
    return int(code != 0 or bool(shown))


def main(pages: list[str]) -> int:
    commands = [command for path in PAGES for command in of_page(path)] + of_help()
    chosen = [command for command in commands if not pages or {command.page, command.page.split()[0]} & set(pages)]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        environment = build_wheel(Path(name))
        with Shell(environment) as shell:
            if "demo" in pages:
                return demo(shell, Path(name))
            prepare(shell, Path(name) / "prepared")
            for page in dict.fromkeys(command.page for command in chosen):
                folder = fresh(Path(name) / "prepared", Path(name) / page)
                for command in [command for command in chosen if command.page == page]:
                    code, seconds, printed = shell.run(command.line, folder)
                    failed += code != 0
                    print(
                        f"{page:20} {'ok' if not code else f'exit {code}':8} {seconds:6.1f} s  {command.line}",
                        flush=True,
                    )
                    if code:
                        print(printed)
    print(f"{len(chosen)} commands, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
