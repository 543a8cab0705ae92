"""tnllm's server on a GPU, beside its own Transformer and transformers' continuous batching of a Llama of the same size.

python -m tests.serving.gpu_bench --out serve-gpu --minutes 8      # from a checkout, on one GPU
python -m tests.serving.gpu_bench --out serve-cpu --small          # the same in miniature, to see it work

Weights are random: speed does not depend on them. Prompts are random tokens, all requests of a row arrive at once, and
every text is as long as asked for. Rows are appended to OUT/rows.jsonl as they are measured, each with its command, so a
run that is cut keeps what it has. `--summary` prints OUT/rows.jsonl as a table.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from tnllm.bench.report import print_table

# Name → preset, whether it is the Transformer, options of the server.
MODELS = {
    "385m": ("385m", False, []),
    "385m-float32": ("385m", False, ["--dtype", "float32"]),
    "1b": ("1b", False, []),
    # Its caches grow with the longest text, for every slot alike.
    "transformer-385m": ("385m", True, []),
    "transformer-385m-32": ("385m", True, ["--slots", "32"]),
}
# In order of worth: name, clients, prompt, prefix, tokens, requests checked alone, seconds at most.
PLAN = [
    ("385m", "1,32,256", 128, 0, 128, 0, 60),
    ("385m", "32", 2048, 0, 2048, 0, 60),
    ("llama-385m", "1,32,256", 128, 0, 128, 0, 100),
    ("llama-385m", "32", 2048, 0, 2048, 0, 150),
    ("385m", "32", 128, 8192, 128, 0, 40),
    ("385m", "1,8", 20_000, 0, 2000, 0, 60),
    ("385m", "500", 32, 0, 32, 500, 60),
    ("385m-float32", "500", 32, 0, 32, 500, 80),
    ("1b", "1,32,256", 128, 0, 128, 0, 60),
    ("1b", "32", 2048, 0, 2048, 0, 60),
    ("transformer-385m", "1,32,256", 128, 0, 128, 0, 60),
    ("llama-385m", "8", 20_000, 0, 2000, 0, 120),
    ("1b", "1,8", 20_000, 0, 2000, 0, 60),
    ("1b", "32", 128, 8192, 128, 0, 40),
    ("transformer-385m-32", "32", 2048, 0, 2048, 0, 90),
    ("llama-1b", "32,256", 128, 0, 128, 0, 100),
    ("llama-385m-compiled", "32,256", 128, 0, 128, 0, 150),
    ("385m", "1,256", 2048, 0, 2048, 0, 90),
    ("385m", "32", 20_000, 0, 2000, 0, 90),
    ("llama-1b", "32", 2048, 0, 2048, 0, 150),
]
WEIGHTS = Path(tempfile.gettempdir()) / f"gpu-bench-{os.getpid()}"
HERE = [sys.executable, "-m", "tests.serving.gpu_bench"]


def config_of(preset, transformer, small):
    from tnllm.modeling.config import get_preset

    preset = {"385m": "tiny", "1b": "demo"}[preset] if small else preset
    config = get_preset(preset)
    if not transformer:
        return config
    # As many parameters: a wider channel mixer makes up for the output gate that it does not have.
    return get_preset(preset, kind="transformer", glu_dim=(config.glu_dim + config.model_dim // 3) // 64 * 64)


def make(name, small, folder):
    """A weights folder of random weights, whose requests are sampled at temperature 1 without further options."""
    import torch

    from tnllm import assets
    from tnllm.modeling.model import build_model
    from tnllm.modeling.weights import save_model

    preset, transformer, _ = MODELS[name]
    device = "cpu" if small else "cuda"
    model = build_model(config_of(preset, transformer, small), torch.device(device), torch.bfloat16, seed=0)
    plain = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    save_model(model, folder, assets.tokenizer_model(), generation=plain)


class Server:
    """`tnllm serve` of one model, which starts at once and is ready when `address` returns."""

    def __init__(self, name, small, out):
        self.log = out / f"server-{name}.log"
        folder = WEIGHTS / name
        folder.parent.mkdir(exist_ok=True)
        made = [*HERE, "--make", name, "--folder", str(folder), *(["--small"] if small else [])]
        slots = [] if not small or "--slots" in MODELS[name][2] else ["--slots", "32"]
        self.command = ["tnllm", "serve", "--model", name, "--port", "0", *slots, *MODELS[name][2]]
        served = [sys.executable, "-m", *self.command[:3], str(folder), *self.command[4:]]
        lines = " ".join(made) + " && exec " + " ".join(served)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", lines], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def address(self, until):
        while time.monotonic() < until and self.process.poll() is None:
            if match := re.search(r"on (http://\S+)", self.log.read_text()):
                return match[1]
            time.sleep(0.2)
        return None

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def load(command, url, seconds, file):
    """Rows of `tnllm bench-serve`, and what it printed."""
    run = [sys.executable, "-m", *command, "--url", url, "--json", str(file)]
    file.unlink(missing_ok=True)
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        said = (done.stdout + done.stderr).splitlines()[-1:]
    except subprocess.TimeoutExpired:
        return [{"error": f"not ended within {seconds:.0f} s"}]
    if not file.is_file():
        return [{"error": " ".join(said)}]
    results = json.loads(file.read_text())
    rows = results["rows"]
    if results["checked"]:
        counts = {"checked": results["checked"], "different": len(results["different"])}
        rows[-1] |= counts | {"of_another": len(results["of_another"])}
    return rows


def peer(name, small, cases):
    """Print a row of transformers' continuous batching for each case (clients, prompt, prefix, tokens)."""
    import torch
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.generation.continuous_batching.utils import WorkloadHints

    preset, _, compiled = name.removeprefix("llama-").partition("-")
    ours, device = config_of(preset, True, small), "cpu" if small else "cuda"
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.model_dim,
        intermediate_size=ours.glu_dim,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_heads,
        tie_word_embeddings=ours.tie_embeddings,
        max_position_embeddings=65536,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if not small else torch.float32).eval()
    # On a GPU it takes most of the free memory for its cache.
    sizes = {"num_blocks": 64, "max_batch_tokens": 512, "block_size": 32} if small else {}
    sizes["default_compile_level"] = 1 if compiled else 0
    for clients, prompt, prefix, tokens in cases:
        shared = random.Random(0).choices(range(3, 8000), k=prefix)
        inputs = [shared + random.Random(number).choices(range(3, 8000), k=prompt) for number in range(clients)]
        options = GenerationConfig(max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1)
        hints = WorkloadHints(max_prompt_length=prefix + prompt, max_generated_length=tokens, num_requests=clients)
        results = []
        with model.continuous_batching_context_manager(
            generation_config=options,
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
            workload_hints=hints,
        ) as manager:
            # The first requests compile and allocate.
            warm = [
                random.Random(f"warm {number}").choices(range(3, 8000), k=min(prompt, 2048)) for number in range(32)
            ]
            for given, length in ((warm[:clients], min(8, tokens)), (inputs, tokens)):
                started = time.perf_counter()
                manager.add_requests(given, max_new_tokens=length, record_timestamps=True)
                results = []
                while len(results) < len(given) and manager.is_running():
                    if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                        results.append(result)
            seconds = time.perf_counter() - started
            blocks = manager.batch_processor.cache.num_blocks if manager.batch_processor else None
            attention = model.config._attn_implementation
        good = [result for result in results if not result.error and len(result.generated_tokens) == tokens]
        times = [[stamp - started for stamp in result.timestamps] for result in good]
        gaps = [after - before for one in times for before, after in pairwise(one)]
        row = {
            "streams": clients, "prompt_tokens": prompt, "prefix_tokens": prefix, "tokens": tokens, "requests": clients,
            "whole": len(good), "failed": clients - len(good), "seconds": seconds,
            "requests_per_s": len(good) / seconds, "tokens_per_s": len(good) * tokens / seconds,
            "attention": attention, "blocks": blocks, "version": transformers.__version__,
            "device_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if not small else None,
        }  # fmt: skip
        lists = {
            "first": [one[0] for one in times],
            "gap": gaps,
            "token": [(one[-1] - one[0]) / (tokens - 1) for one in times],
        }
        for key, values in lists.items():
            for share in (50, 99):
                ranked = sorted(values)
                at = min(len(ranked) - 1, share * len(ranked) // 100)
                row[f"{key}_p{share}_ms"] = 1e3 * ranked[at] if ranked else None
        print("ROW " + json.dumps(row), flush=True)


def peer_rows(name, small, cases, seconds):
    command = [*HERE, "--peer", name, "--cases", json.dumps(cases), *(["--small"] if small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        out, error = done.stdout, (done.stderr.splitlines() or ["it printed nothing"])[-1]
    except subprocess.TimeoutExpired as late:
        out, error = (late.stdout or b"").decode(), f"not ended within {seconds:.0f} s"
    rows = [json.loads(line.removeprefix("ROW ")) for line in out.splitlines() if line.startswith("ROW ")]
    return rows if len(rows) == len(cases) else [*rows, {"error": error}]


class Run:
    """Servers that are up, and rows as they come."""

    def __init__(self, out, end, small):
        self.out, self.end, self.small = out, end, small
        self.servers, self.addresses = {}, {}

    def start(self, names):
        """Together: starting compiles kernels, which would disturb what is measured."""
        self.servers |= {name: Server(name, self.small, self.out) for name in names}
        until = min(self.end, time.monotonic() + 240)
        for name in names:
            self.addresses[name] = self.servers[name].address(until)
            # So do the first prompts.
            for prompt in (128, 2500) if self.addresses[name] and not self.small else ():
                self.load(
                    name, ["--streams", "1,8", "--prompt-tokens", str(prompt), "--tokens", "9", "--check", "0"], 60
                )

    def load(self, name, options, seconds):
        if self.addresses[name] is None or self.servers[name].process.poll() is not None:
            return [{"error": "the server did not start or has ended; see its log"}]
        return load(["tnllm", "bench-serve", *options], self.addresses[name], seconds, self.out / "last.json")

    def measure(self, number, name, clients, prompt, prefix, tokens, check, most):
        """The rows of one line of the plan."""
        if self.small:
            prompt, prefix, tokens = max(4, prompt // 64), prefix // 64, max(4, tokens // 64)
            # Other work may keep the machine busy.
            clients, check, most = clients.replace("256", "16").replace("500", "40"), min(check, 10), 4 * most
        began, left = time.monotonic(), min(self.end - time.monotonic() - 2, most)
        if name.startswith("llama"):
            command = ["python", *HERE[1:], "--peer", name]
            rows = peer_rows(
                name, self.small, [(int(count), prompt, prefix, tokens) for count in clients.split(",")], left
            )
        else:
            if name not in self.servers:
                self.start([name])
            sizes = {
                "streams": clients,
                "prompt-tokens": prompt,
                "prefix-tokens": prefix,
                "tokens": tokens,
                "check": check,
            }
            # No row finds another's prompts in the prefix cache.
            sizes["seed"] = 10_000 * number
            options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
            rows = self.load(name, options, left)
            command = [*self.servers[name].command, "&", "tnllm", "bench-serve", *options]
        with (self.out / "rows.jsonl").open("a") as file:
            for row in rows:
                about = {"model": name, "command": " ".join(command), "took_s": round(time.monotonic() - began, 1)}
                file.write(json.dumps(about | row) + "\n")
                print(json.dumps(about | row), flush=True)
        if name.startswith("transformer"):
            self.servers.pop(name).stop()


def run(out, minutes, small, only):
    out.mkdir(parents=True, exist_ok=True)
    state = Run(out, time.monotonic() + 60 * minutes, small)
    plan = [row for row in PLAN if not only or row[0] in only]
    try:
        linear = [row[0] for row in plan if row[0] in MODELS and not row[0].startswith("transformer")]
        state.start(list(dict.fromkeys(linear)))
        for number, row in enumerate(plan):
            if time.monotonic() < state.end - 5:
                state.measure(number, *row)
    finally:
        for server in state.servers.values():
            server.stop()
        shutil.rmtree(WEIGHTS, ignore_errors=True)


def summary(out):
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    times = [(title, f"{{{key}_p50_ms:.4g}} / {{{key}_p99_ms:.4g}}") for title, key in
             (("first token ms", "first"), ("between texts ms", "gap"), ("ms a token", "token"))]  # fmt: skip
    columns = [
        ("model", "{model}"), ("streams", "{streams}"),
        ("prompt", "{prefix_tokens} + {prompt_tokens}"),
        ("tokens", "{tokens}"), ("complete", "{whole} of {requests}"), *times, ("tokens/s", "{tokens_per_s:,.0f}"),
        ("server MiB", "{memory_peak_mib:,.0f}"), ("GPU MiB", "{device_peak_mib:,.0f}"),
        ("alone", lambda row: f"{row['checked'] - row['different']} of {row['checked']}" if "checked" in row else ""),
        ("", lambda row: row.get("error", "")),
    ]  # fmt: skip
    print_table("", columns, rows, left=("model", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--small", action="store_true", help="tiny models and short texts, on a CPU")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of models, with commas")
    parser.add_argument("--summary", action="store_true")
    for name in ("--make", "--folder", "--peer", "--cases"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.small, Path(given.folder))
    elif given.peer:
        peer(given.peer, given.small, [tuple(case) for case in json.loads(given.cases)])
    elif given.summary:
        summary(given.out)
    else:
        run(given.out, given.minutes, given.small, given.only)


if __name__ == "__main__":
    main()
