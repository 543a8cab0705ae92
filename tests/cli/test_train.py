"""`tnllm train` as typed: the lines a person sees, and the exit codes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tnllm.cli.main import main
from tnllm.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.vocab_size": 320,
    "model.model_dim": 32,
    "model.num_layers": 2,
    "model.glu_dim": 48,
    "data.seq_len": 32,
    "train.global_batch_tokens": 256,
    "train.micro_batch_size": 4,
    "train.max_steps": 4,
    "schedule.warmup_steps": 1,
    "eval.sample_prompts": "[]",
    "eval.tokens": 500,
}


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """`--set` flags that make `tiny` learn a small text of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "one two three four five six seven eight nine ten " * 60
    (tmp_path / "corpus.txt").write_text("".join(f"{text[i : i + 300]}\n" for i in range(0, 2000, 7)))
    (tmp_path / "tokenizer.model").write_bytes(
        train_tokenizer(
            [text + "the quick brown fox jumps over a lazy dog while seven wizards box near old quiet jetty " * 30], 320
        )
    )
    keys = {**SMALL, "data.path": tmp_path / "corpus.txt", "tokenizer.path": tmp_path / "tokenizer.model"}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def run(capfd, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code, *capfd.readouterr()


def test_a_run_and_its_continuation(capfd, tmp_path, sets):
    out = tmp_path / "run"
    code, shown, err = run(capfd, "train", "tiny", "--device", "cpu", "--out", out, *sets)
    assert code == 0 and shown == ""
    lines = err.splitlines()
    assert any("transnormer" in line and "parameters on cpu; 4 steps of 256 tokens" in line for line in lines)
    assert any(line.startswith("this CPU does about") and line.endswith("for the whole run") for line in lines)
    assert any(line.startswith("step 4/4  loss ") for line in lines)
    assert any("val_bpb" in line for line in lines)
    assert lines[-1] == f"weights in {out / 'weights'}; try: tnllm generate --model {out} --prompt '...'"

    code, _, err = run(capfd, "train", "tiny", "--device", "cpu", "--out", out, *sets)
    assert (code, err) == (
        2,
        f"tnllm: {out} holds a run already; add --resume auto to resume it, or choose another --out\n",
    )
    more = (*sets, "--set", "train.max_steps=6", "--resume", "auto")
    code, _, err = run(capfd, "train", "tiny", "--device", "cpu", "--out", out, *more)
    assert code == 0 and "after step 4" in err and "step 6/6" in err


def test_dry_run_allocates_nothing(capfd):
    code, out, _ = run(capfd, "train", "385m", "--dry-run")
    assert code == 0 and "398,984,192" in out and "micro-batches of" in out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["here"].startswith(("cpu: ", "cuda", "would not start: one row of 2048 tokens needs about"))
    assert "; the model would learn them by heart: name a larger corpus with data.path" in lines["passes"]


def test_dry_run_says_what_this_machine_would_take(capfd):
    code, out, _ = run(capfd, "train", "tiny", "--dry-run", "--device", "cpu", "--set", "train.max_steps=20")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and lines["here"].startswith("cpu: ") and " free; " in lines["here"]
    assert lines["here"].endswith("at the rate of its matrix products") and "at least " in lines["here"]
    assert "by heart" not in lines["passes"] and lines["passes"].startswith("about 0.")
    code, out, _ = run(capfd, "train", "tiny", "--dry-run", "--device", "cuda:77")
    assert code == 0 and "here    would not start: train.device is 'cuda:77'" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-recipe"], "no-such-recipe"),
        (["tiny", "--set", "train.maxsteps=3"], "train.maxsteps: no such key; did you mean 'train.max_steps'?"),
        (["tiny", "--set", "train.max_steps=soon"], "train.max_steps is 'soon'"),
        (["tiny", "--nproc", "3"], "must be a multiple of 6144 = data.seq_len 256 * train.micro_batch_size 8 * 3"),
        (["tiny", "--world-size", "8"], "--world-size is for --dry-run"),
        (["7b"], "asks for 64 ranks (replicate 8 * shard 8 * sequence 1 * tensor 1), and 1 is here; start that many"),
        (["tiny", "--set", "data.path=/no/such.txt", "--out", "OUT"], "/no/such.txt"),
        (["tiny", "--set", "model.vocab_size=1000", "--out", "OUT"], "8192 pieces, more than model.vocab_size 1000"),
        (["tiny", "--out", "/dev/null/run"], "--out is /dev/null/run, and /dev/null is a file, not a folder"),
        (["tiny", "--out", "s3://bucket/run"], "--out is the URL s3:/bucket/run; give a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capfd, tmp_path, args, message):
    args = [str(tmp_path / "run") if arg == "OUT" else arg for arg in args]
    code, out, err = run(capfd, "train", *args)
    assert code == 2 and out == ""
    assert message in err and len(err.strip().splitlines()) == 1 and err.startswith("tnllm: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_so(tmp_path, sets, number, code):
    command = [sys.executable, "-m", "tnllm", "train", "tiny", "--device", "cpu", "--out", str(tmp_path / "run"), *sets]
    command += ["--set", "train.max_steps=100000", "--set", "log.every_steps=1", "--set", "eval.every_steps=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step"):
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait() == code
    assert "resume with --resume auto" in rest and "Traceback" not in rest
    assert (tmp_path / "run" / "latest").exists()
