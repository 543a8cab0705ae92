"""The scripts in examples/ run as they are, in an empty folder."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.generation.conftest import tokenizer
from tests.serving.serving import running
from tests.small_models import make_ready, small_model
from tnllm import assets
from tnllm.data.remote import read_documents
from tnllm.modeling.weights import save_model
from tnllm.serving.middleware import Settings
from tnllm.tokenizer import train_tokenizer

__all__ = ["tokenizer"]

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *words: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, EXAMPLES / name] if name.endswith(".py") else ["bash", EXAMPLES / name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_train_from_python(tmp_path):
    assert run("train_from_python.py", "2", cwd=tmp_path).strip()
    assert (tmp_path / "runs" / "from-python" / "weights" / "model.safetensors").is_file()
    # Again: the finished run is taken up, not refused.
    assert run("train_from_python.py", "3", cwd=tmp_path).strip()


@pytest.mark.slow
def test_own_data(tmp_path):
    documents = (item.text for item in islice(read_documents([assets.sample_corpus()]), 200))
    documents = [text for text in documents if text.isascii()]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    run("own_data.py", "texts", cwd=tmp_path)
    assert (tmp_path / "own-data" / "run" / "weights" / "model.safetensors").is_file()


@pytest.mark.slow
def test_fork_a_state(tmp_path):
    lines = run("fork_a_state.py", cwd=tmp_path).splitlines()
    assert "KiB" in lines[0] and len(lines) == 4
    assert (tmp_path / "book.state").is_file()


def test_states_of_a_server(tmp_path, tokenizer):
    ready = make_ready(small_model(), tokenizer)
    with running(ready, Settings(name="small", more_keys=("one",)), num_slots=2) as (address, engine):
        lines = run("states_of_a_server.py", address, cwd=tmp_path, TNLLM_API_KEY="one").splitlines()
        assert "KiB: state-" in lines[0] and len(lines) == 9
        assert "\ntnllm_states 0\n" in engine.metrics.text()
    assert (tmp_path / "book.state").is_file()


def test_answers_in_a_schema(tmp_path, tokenizer):
    pytest.importorskip("llguidance", reason="needs the extra schema")
    with running(make_ready(small_model(), tokenizer), Settings(name="small"), num_slots=2) as (address, engine):
        lines = run("answers_in_a_schema.py", address, cwd=tmp_path).splitlines()
        assert engine.metrics.grammars == 4 and engine.metrics.tool_calls == 1
    assert lines[0].startswith("a ") and lines[2] in ("yes", "no") and lines[3].startswith("introduce {")


def test_adapters_of_a_server(tmp_path):
    lines = run("adapters_of_a_server.py", "1", cwd=tmp_path, OMP_NUM_THREADS="1").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["cook", "sailor", "tnllm-demo", "cook", "sailor"]
    assert (tmp_path / "adapters" / "cook" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_onnx_generate(tmp_path):
    """The greedy text of `tnllm generate`, without torch."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["The old house stood by the river.\n"] * 40, 320))
    save_model(small_model(num_layers=2), tmp_path / "weights", tmp_path / "tokenizer.model")
    tnllm = [sys.executable, "-m", "tnllm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*tnllm, "convert", "weights", "graph", "--to", "onnx", "--no-verify"],
        cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    greedy = ["--max-tokens", "8", "--temperature", "0", "--repetition-penalty", "1"]
    asked = [*tnllm, "generate", "--model", "weights", *greedy, "--prompt", "The old house"]
    ours = subprocess.run(asked, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed')")
    made = run("onnx_generate.py", "graph", "The old house", "8", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert made == f"The old house{ours.stdout}"


@pytest.mark.slow
def test_own_eval_task(tmp_path):
    assert '"acc,none"' in run("own_eval_task.py", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))


def test_slurm_starts_torchrun_on_every_machine(tmp_path):
    """With stand-ins for Slurm's commands: what would be started."""
    for name, body in {"scontrol": "echo node1; echo node2", "srun": 'printf "%s\\n" "$@"'}.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    words = run("slurm.sh", "1b", "/shared/tokens", "/shared/runs/1b", cwd=tmp_path, PATH=path, **job).split("\n")
    assert words[:3] == ["torchrun", "--nnodes", "2"] and "node1:29500" in words
    assert words[words.index("tnllm") + 1 : -1] == [
        "train", "1b", "--set", "data.path=/shared/tokens", "--out", "/shared/runs/1b", "--resume", "auto",
    ]  # fmt: skip
