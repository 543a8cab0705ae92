"""Decoding speed on a CPU: this package's torch, and onnxruntime in float32 and int8, in turns; prints the docs' table.

    python -m tests.engines.onnx_speed [--rounds N] [--threads N ...] [--folders FLOAT32 INT8]

FLOAT32 and INT8: what `tnllm convert DEMO FOLDER --to onnx` wrote, made if not given. The demo model, one text. A round
gives each of them 50 tokens; the fastest round counts, since others use the machine too. One thread is timed in CPU
seconds, which a busy machine disturbs least; two threads by the clock, so they need a free machine.
The loop around onnxruntime is that of examples/onnx_generate.py.
"""

import argparse
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
from tnllm.generation.loading import load
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece
from tnllm.tokenizer import Tokenizer

TOKENS = 50
DEMO = assets.demo_weights()


def clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def with_torch(threads: int) -> Callable[[], float]:
    """A function that generates and returns tokens per second, after the first token."""
    ready = load(DEMO, "cpu")
    params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=TOKENS + 1, ignore_eos=True)

    def measure() -> float:
        torch.set_num_threads(threads)
        start = 0.0
        for event in generate(ready.model, ready.tokenizer, ["Once upon a time"], params):
            if isinstance(event, Piece) and not start:
                start = clock(threads)
        return TOKENS / (clock(threads) - start)

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
            start = start or clock(threads)
        return TOKENS / (clock(threads) - start)

    return measure


def export(folder: Path) -> list[Path]:
    """The demo model's two graphs."""
    folders = [folder / "float32", folder / "int8"]
    for target, more in zip(folders, ([], ["--quantize", "int8"]), strict=True):
        subprocess.run([sys.executable, "-m", "tnllm", "convert", DEMO, target, "--to", "onnx", *more], check=True)
    return folders


def main(rounds: int, threads_tried: list[int], folders: list[Path]) -> None:
    measures = {("torch, float32", threads): with_torch(threads) for threads in threads_tried}
    for (kind, folder), threads in itertools.product(zip(("float32", "int8"), folders, strict=True), threads_tried):
        measures[f"onnxruntime, {kind}", threads] = with_onnx(folder / "model.onnx", threads)
    speeds = defaultdict(list)
    for _, (key, measure) in itertools.product(range(rounds), measures.items()):
        speeds[key].append(measure())
    print(
        "| tokens/s | threads | fastest | median | median of torch / this, by round |\n| --- | --- | --- | --- | --- |"
    )
    for (kind, threads), values in speeds.items():
        ratio = np.median(np.divide(speeds["torch, float32", threads], values))
        print(f"| {kind} | {threads} | {max(values):.0f} | {np.median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folders", type=Path, nargs=2, metavar=("FLOAT32", "INT8"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        main(arguments.rounds, arguments.threads, arguments.folders or export(Path(name)))
