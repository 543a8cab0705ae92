"""Decoding speed on a CPU: this package's torch, and onnxruntime in float32 and int8, in turns; prints the docs' table.

    python -m tests.engines.onnx_speed [ROUNDS [FLOAT32 INT8]]

FLOAT32 and INT8: folders of `tnllm convert DEMO FOLDER --to onnx`, made if not given. The demo model, one text. A round
gives each of them 100 tokens; the fastest round counts, since others use the machine too.
The loop around onnxruntime is that of examples/onnx_generate.py.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from tnllm import assets
from tnllm.generation.decoder import generate
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece
from tnllm.modeling.weights import load_model
from tnllm.tokenizer import Tokenizer

TOKENS = 100
DEMO = assets.demo_weights()


def with_torch(threads: int) -> Callable[[], float]:
    """A function that generates and returns tokens per second, after the first token."""
    model, tokenizer = load_model(DEMO, dtype=torch.float32), Tokenizer.load(DEMO)
    params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=TOKENS + 1, ignore_eos=True)

    def measure() -> float:
        torch.set_num_threads(threads)
        start = 0.0
        for event in generate(model, tokenizer, ["Once upon a time"], params):
            if isinstance(event, Piece) and not start:
                start = time.perf_counter()
        return TOKENS / (time.perf_counter() - start)

    return measure


def with_onnx(file: Path, threads: int) -> Callable[[], float]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for work in a loop would slow down the others' rounds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    ids = Tokenizer.load(DEMO).encode("Once upon a time")

    def measure() -> float:
        state = {item.name: np.zeros((1, *item.shape[1:]), np.float32) for item in graph.get_inputs()[2:]}
        start, position, new = 0.0, 0, ids
        for _ in range(TOKENS + 1):
            inputs = {"tokens": np.array([new]), "position": np.array([position]), **state}
            logits, *after = graph.run(None, inputs)
            state, position, new = (
                dict(zip(state, after, strict=True)),
                position + len(new),
                [int(logits[0, -1].argmax())],
            )
            start = start or time.perf_counter()
        return TOKENS / (time.perf_counter() - start)

    return measure


def export(folder: Path) -> list[Path]:
    """The demo model's two graphs."""
    folders = [folder / "float32", folder / "int8"]
    for target, more in zip(folders, ([], ["--quantize", "int8"]), strict=True):
        subprocess.run([sys.executable, "-m", "tnllm", "convert", DEMO, target, "--to", "onnx", *more], check=True)
    return folders


def main(rounds: int, folders: list[Path]) -> None:
    measures = {("torch, float32", threads): with_torch(threads) for threads in (1, 2)}
    for (kind, folder), threads in itertools.product(zip(("float32", "int8"), folders, strict=True), (1, 2)):
        measures[f"onnxruntime, {kind}", threads] = with_onnx(folder / "model.onnx", threads)
    speeds = defaultdict(list)
    for _, (key, measure) in itertools.product(range(rounds), measures.items()):
        speeds[key].append(measure())
    print("| tokens/s | one thread | two threads |\n| --- | --- | --- |")
    for kind in dict.fromkeys(kind for kind, _ in measures):
        print(f"| {kind} | {max(speeds[kind, 1]):.0f} | {max(speeds[kind, 2]):.0f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        given = [Path(argument) for argument in sys.argv[2:]]
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, given or export(Path(name)))
