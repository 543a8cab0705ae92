"""`tnllm train --nproc 2` as typed: a rank is killed, a SIGTERM arrives, one process ends the run; and plans for many."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
import torch

from tnllm.modeling.weights import load_model
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = ["vocab_size=8192", "model_dim=32", "num_heads=2", "num_layers=2", "glu_dim=48"]
SETS = [f"model.{item}" for item in SMALL]
SETS += ["data.seq_len=32", "train.global_batch_tokens=256", "train.micro_batch_size=2", "train.device=cpu"]
SETS += [
    "schedule.warmup_steps=1",
    "eval.every_steps=20",
    "eval.tokens=1K",
    "log.every_steps=1",
    "checkpoint.every_steps=5",
]
FLAGS = [part for item in SETS for part in ("--set", item)]


def start(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tnllm", "train", "tiny", "--out", str(out), *FLAGS, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    """Processes started by `process`, from Linux's /proc."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in tasks for child in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a rank's process in Linux's /proc")
def test_a_lost_rank_a_sigterm_and_another_mesh(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--nproc", "2", "--max-restarts", "1", "--set", "train.max_steps=100000")
    seen, killed, stopped = [], False, False
    watch = Timer(200, process.kill)  # a run that hangs fails the test instead of holding it up
    watch.start()
    for line in process.stderr:
        seen.append(line)
        if line.startswith("step      7/") and not killed:
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            killed = True
        if line.startswith("step     12/") and killed and not stopped:
            process.send_signal(signal.SIGTERM)
            stopped = True
    watch.cancel()
    text = "".join(seen)
    assert process.wait() == 143, text
    assert killed and stopped and "Traceback" not in text
    assert "another rank was lost" in text and "resumed from" in text
    assert "stopped by SIGTERM; everything is saved, resume with --resume auto" in text

    # One process goes on, and all losses are those of one that was alone from the start.
    config = load_recipe("tiny", [*SETS, "train.max_steps=20", "eval.sample_prompts=[]"])
    train(config, out, resume="auto")
    train(config, tmp_path / "alone")
    ours, expected = (read_metrics(run / "metrics.jsonl") for run in (out, tmp_path / "alone"))
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for row, reference in zip(ours, expected, strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & set(reference):
            assert row[key] == pytest.approx(reference[key], rel=1e-4)
    assert "rank_wait_s" in ours[0] and ours[0]["straggler"] in (0, 1)

    # The finished run in another folder, on two ranks: nothing to do but to publish.
    process = start(tmp_path / "new", "--nproc", "2", "--resume", str(out), "--set", "train.max_steps=20")
    assert process.stderr is not None
    text = process.stderr.read()
    assert process.wait() == 0 and "after step 20" in text, text
    ours, expected = (load_model(run).state_dict() for run in (tmp_path / "new", out))
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.slow
def test_dry_run_spreads_the_model_over_imaginary_ranks(tnllm):
    code, out, err = tnllm("train", "175b", "--dry-run", "--world-size", "1024")
    assert (code, err) == (0, "")
    assert "replicate 1 * shard 128 * sequence 1 * tensor 8 = 1024 ranks" in out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["rank"].startswith("169M parameters") and "h100" in lines["fits"]
    assert "weights" in lines["sends"] and "tensor" in lines["sends"]


@pytest.mark.slow
def test_dry_run_of_an_adapter(tnllm):
    flags = ["--dry-run", "--world-size", "64", "--set"]
    full, adapter = (tnllm("train", "7b", *flags, f"lora.rank={rank}")[1] for rank in (0, 16))
    full, adapter = (dict(line.split(maxsplit=1) for line in out.splitlines()) for out in (full, adapter))
    assert "with an adapter of" in adapter["model"] and "= 64 ranks" in adapter["mesh"]
    assert "optimizer 6.37 GiB" in full["rank"] and "MiB, optimizer" in adapter["rank"]
    assert float(adapter["sends"].split()[0]) < float(full["sends"].split()[0])


def test_dry_run_shards_a_recipe_of_one_rank(tnllm):
    sets = ["--set", "train.global_batch_tokens=1M"]
    code, out, _ = tnllm(
        "train", "385m", "--dry-run", "--world-size", "8", *sets[:1], "train.global_batch_tokens=524288"
    )
    assert code == 0 and "shard 8 * sequence 1 * tensor 1 = 8 ranks" in out


@pytest.mark.parametrize(
    ("recipe", "sets", "message"),
    [
        ("7b", [], "asks for 64 ranks (replicate 8 * shard 8 * sequence 1 * tensor 1), and 3 are here"),
        ("tiny", ["parallel.tensor=3"], "parallel.tensor is 3; it must divide model.num_heads 2"),
        ("tiny", ["parallel.sequence=3"], "parallel.sequence is 3; it must divide data.seq_len 256"),
        (
            "tiny",
            ["parallel.tensor=2", "lora.rank=4"],
            "matrices are not split; with lora set parallel.tensor=1",
        ),
        ("tiny-transformer", ["parallel.sequence=2"], "softmax attention has no state to pass on"),
    ],
)
def test_meshes_that_do_not_fit_are_one_line(tnllm, recipe, sets, message):
    flags = [part for item in sets for part in ("--set", item)]
    code, out, err = tnllm("train", recipe, "--dry-run", "--world-size", "3", *flags)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
