"""Faults, counted: kills at random moments, signals, second writers, steps back, damage, full disks. Not a test: a tool.

    python -m tests.training.faults --kills 100 --json faults.json      # half an hour on a CPU

A very small model is trained on a made-up corpus, once undisturbed. After every kill the rows and the newest checkpoint
must be those of the undisturbed run, and every disturbed run must end with its metrics and weights, bit for bit. The
disks are tmpfs mounts, which need root or user namespaces; where there is neither, it says so.
Exits 1 if any case went another way than it should.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PARTS = ("stops", "disks", "damages", "kills")
RECIPE = """
model: {preset: tiny, vocab_size: 320, model_dim: 32, num_heads: 2, num_layers: 2, glu_dim: 48}
tokenizer: {path: FOLDER/tokenizer.model}
data: {path: FOLDER/corpus.txt, seq_len: 32, val_fraction: 0.05}
schedule: {warmup_steps: 10}
train: {max_steps: STEPS, global_batch_tokens: 512, micro_batch_size: 8, device: cpu, seed: 7}
eval: {every_steps: 4, tokens: 1K}
log: {every_steps: 1}
checkpoint: {every_steps: 2, keep: 2}
"""


def make_recipe(folder: Path, steps: int) -> Path:
    """A recipe with a corpus and a tokenizer of its own, all in `folder`."""
    from tnllm.tokenizer import train_tokenizer

    draw = random.Random(0)
    sentence = "the quick brown fox jumps over a lazy dog while seven wizards box near old quiet jetty"
    words = sentence.split(" ")
    lines = [" ".join(draw.choice(words) for _ in range(30)) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(lines, vocab_size=320))
    path = folder / f"faults-{steps}.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)).replace("STEPS", str(steps)))
    return path


class Training:
    """`tnllm train` in a process of its own, forked after the imports, which would take most of the time."""

    def __init__(self, recipe: Path, out: Path, home: Path, *more: str, resume: str = "auto") -> None:
        import tnllm.training.launch  # noqa: F401 - before the fork
        from tnllm.cli.main import main

        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            self.stderr = os.fdopen(reader, encoding="utf-8")
            return
        code: Any = 1
        try:
            os.dup2(writer, 2)
            os.environ["HOME"] = str(home)  # a token cache of its own
            sys.argv[1:] = ["train", str(recipe), "--out", str(out), "--resume", resume, *more]
            main(sys.argv[1:])
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code and what is left of stderr."""
        shown = self.stderr.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), shown


def finish(*run: Any, **how: str) -> tuple[int, str]:
    """Run to the end; exit code and stderr."""
    return Training(*run, **how).wait()


def measured(out: Path) -> list[tuple[Any, ...]]:
    """Step, loss, gradient norm and validation loss of every row."""
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [tuple(row.get(key) for key in ("step", "loss", "grad_norm", "val_loss")) for row in rows]


def outcome(out: Path) -> tuple[list[tuple[Any, ...]], str]:
    """What must be equal: the rows, and the weights' SHA-256."""
    return measured(out), hashlib.sha256((out / "weights/model.safetensors").read_bytes()).hexdigest()


def as_undisturbed(out: Path, straight: Path) -> bool:
    """Whether the rows so far are those of the run `straight`, and the newest checkpoint has the same files as its own."""
    from tnllm.training.checkpoint import find_checkpoint

    rows = measured(out)
    newest = find_checkpoint(out, "auto", lambda text: None)
    sums = [{}, {}]
    if newest is not None:
        sums = [
            json.loads((run / "checkpoints" / newest.name / "manifest.json").read_text()) for run in (out, straight)
        ]
    # recipe.json holds checkpoint.keep.
    same = all(sums[0][name] == sums[1][name] for name in sums[0] if name != "recipe.json")
    return rows == measured(straight)[: len(rows)] and same


def kill_once(recipe: Path, out: Path, home: Path, draw: random.Random) -> str | None:
    """Start or resume, SIGKILL at a random moment; what the run was doing then (None: it had finished)."""
    process = Training(recipe, out, home)
    stepping = draw.random() < 0.85
    if stepping:
        for line in process.stderr:
            if line.startswith("step"):
                break
    # A second of lines does not fill the pipe, which would stop the run.
    time.sleep(draw.uniform(0, 0.6))
    process.send(signal.SIGKILL)
    if process.wait()[0] != -signal.SIGKILL:
        return None
    if list((out / "checkpoints").glob("*.tmp-*")):
        return "writing a checkpoint"
    if not stepping:
        return "starting"
    latest = (out / "latest").read_text().strip() if (out / "latest").exists() else ""
    newest = max((path.name for path in (out / "checkpoints").glob("step-*")), default="")
    return "training" if latest == newest else "between a checkpoint and its name in `latest`"


def kills(folder: Path, count: int, seed: int, say: Any) -> dict[str, Any]:
    """Ten runs share the kills; each is then finished and compared with the undisturbed one."""
    recipe = make_recipe(folder, steps=240)
    code, shown = finish(recipe, folder / "straight", folder, "--set", "checkpoint.keep=1000")
    assert code == 0, shown
    expected = outcome(folder / "straight")
    draw = random.Random(seed)
    moments: Counter[str] = Counter()
    equal = runs = alike = 0
    while sum(moments.values()) < count:
        out = folder / f"killed-{runs}"
        for _ in range(min(5, count - sum(moments.values()))):
            moment = kill_once(recipe, out, folder, draw)
            if moment is None:
                break
            moments[moment] += 1
            alike += as_undisturbed(out, folder / "straight")
        code, shown = finish(recipe, out, folder)
        same = code == 0 and outcome(out) == expected and not list((out / "checkpoints").glob("*.tmp-*"))
        equal += same
        runs += 1
        say(
            f"{sum(moments.values())} of {count} kills, {alike} of them left the rows and the checkpoint of the "
            f"undisturbed run; {equal} of {runs} runs ended bit for bit like it"
        )
        if not same:
            say(shown[-2000:])
    kills = {"kills": sum(moments.values()), "left as undisturbed": alike, "moments": dict(moments)}
    return {**kills, "runs": runs, "bit-equal ends": equal}


def stops(folder: Path, count: int, say: Any) -> list[dict[str, Any]]:
    """SIGTERM in a run that validates after every step, a second writer while it stands still, and a step back."""
    # Steps of one long pass, so that most signals come within one: it ends, and its validation is due.
    sets = ("train.global_batch_tokens=4096", "train.micro_batch_size=128", "train.max_steps=40", "checkpoint.keep=20")
    often = [f"--set={item}" for item in (*sets, "eval.every_steps=1", "eval.tokens=32")]
    recipe = make_recipe(folder, steps=240)
    code, shown = finish(recipe, folder / "often", folder, *often)
    assert code == 0, shown
    expected, draw = outcome(folder / "often"), random.Random(1)
    results: list[dict[str, Any]] = []

    def add(case: str, good: bool, said: str) -> None:
        results.append({"case": case, "good": good, "said": said.replace(f"{folder}/", "")})
        say(f"{'ok' if good else 'BAD'}: {case}: {results[-1]['said']}")

    for number in range(count):
        out, owed = folder / f"stopped-{number}", 0
        for stop in range(4):
            process = Training(recipe, out, folder, *often)
            for line in process.stderr:
                if line.startswith("step"):
                    break
            time.sleep(draw.uniform(0, 0.1))
            process.send(signal.SIGSTOP)
            if stop == 0:
                code, shown = finish(recipe, out, folder)
                refused = code == 2 and f"is being written by pid {process.pid} on" in shown
                add("second writer", refused, shown.strip().splitlines()[-1])
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
            process.wait()
            state = out / "checkpoints" / (out / "latest").read_text().strip() / "state.json"
            owed += bool(json.loads(state.read_text())["owed"])
        code, shown = finish(recipe, out, folder, *often)
        add("SIGTERM", code == 0 and outcome(out) == expected, f"{owed} of 4 came when a validation was due")
        oldest = min((out / "checkpoints").iterdir())
        code, shown = finish(recipe, out, folder, *often, resume=str(oldest))
        said = next((line for line in shown.splitlines() if " moved to " in line), shown[-300:])
        add("step back", code == 0 and outcome(out) == expected and " moved to " in said, said)
    return results


def damages(folder: Path, say: Any) -> list[dict[str, Any]]:
    """Every file of the newest checkpoint cut short, with one bit turned, or gone."""
    from tnllm.training.checkpoint import list_checkpoints

    recipe = make_recipe(folder, steps=12)
    code, shown = finish(recipe, folder / "undisturbed", folder)
    assert code == 0, shown
    expected = outcome(folder / "undisturbed")
    newest = list_checkpoints(folder / "undisturbed")[-1]
    files = sorted(str(path.relative_to(folder / "undisturbed")) for path in newest.rglob("*") if path.is_file())
    cases = [(file, how) for file in [*files, "latest"] for how in ("truncated", "bit-flipped", "missing")]
    results = []
    for file, how in cases:
        out = folder / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "undisturbed", out)
        spoil(out / file, how)
        code, shown = finish(recipe, out, folder)
        # `latest` is for other commands; a run looks at the folders themselves.
        named = file == "latest" or f"checkpoint {newest.name} cannot be used" in shown
        good = code == 0 and named and outcome(out) == expected
        line = next((line for line in shown.splitlines() if "cannot be used" in line), "went on from it unharmed")
        results.append({"file": file, "damage": how, "good": good, "said": line.replace(f"{out}/", "")})
        say(f"{'ok' if good else 'BAD'}: {file} {how}: {results[-1]['said']}")
    return results


def spoil(file: Path, how: str) -> None:
    """Damage one file."""
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def disks(folder: Path, say: Any) -> list[dict[str, Any]]:
    """A disk that fills up, and one that becomes read-only; both mended, the run goes on to the same end."""
    recipe = make_recipe(folder, steps=12)
    code, shown = finish(recipe, folder / "undisturbed", folder)
    assert code == 0, shown
    expected = outcome(folder / "undisturbed")
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        say("a full and a read-only disk: not tried, mounting needs root (unshare --user --map-root-user --mount)")
        return []
    results = []
    for name in ("full disk", "read-only disk"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
        try:
            out = disk / "run"
            # Ends at a step that validates anyway, so that there is a checkpoint to go on from.
            code, shown = finish(recipe, out, folder, "--set", "train.max_steps=8")
            assert code == 0, shown
            if name == "full disk":
                fill(disk, leave=200_000)
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            code, shown = finish(recipe, out, folder)
            last = shown.strip().splitlines()[-1].replace(f"{disk}/", "")
            clear = code == 1 and last.startswith("tnllm: ") and "Traceback" not in shown
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            (disk / "filler").unlink(missing_ok=True)
            again, shown = finish(recipe, out, folder)
            good = clear and again == 0 and outcome(out) == expected
            results.append({"case": name, "exit": code, "said": last, "good": good})
            say(f"{'ok' if good else 'BAD'}: {name}: exit {code}: {last}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return results


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * max(0, free - leave))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=5, help="runs that are stopped four times each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="leave the other parts out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = {"stops": lambda: stops(folder, args.stops, say), "disks": lambda: disks(folder, say)}
        work["damages"] = lambda: damages(folder, say)
        parts = {name: part() for name, part in work.items() if name in args.only}
        killed = kills(folder, args.kills, args.seed, say) if args.kills and "kills" in args.only else None
    good = all(case["good"] for part in parts.values() for case in part)
    counts = [f"{sum(case['good'] for case in part)} of {len(part)} {name} ended well" for name, part in parts.items()]
    if killed is not None:
        good = good and killed["runs"] == killed["bit-equal ends"] and killed["left as undisturbed"] == killed["kills"]
        counts.append(json.dumps(killed))
    say("; ".join(counts))
    say(f"{'all as it should be' if good else 'NOT as it should be'}, in {time.time() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"kills": killed, **parts}, indent=2) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
