"""Where the host's time of an eager call goes: launches, dispatch of the operator, autograd. On a GPU, else on the CPU:

python -m tests.bench.host --json host.json

Calls are queued without waiting for the device; `launch` calls the functions that launch the kernels, `dispatch` is what
the registered operators add, `autograd` what recording the call and walking back adds. Beside fla where it is installed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tnllm.bench.providers import PROVIDERS
from tnllm.bench.report import environment_line, print_table, write_json
from tnllm.bench.timing import synchronize
from tnllm.device import describe_device
from tnllm.kernels.lightning_attention import chunk, op

# Calls in the queue at once: few enough that the device never makes the host wait.
QUEUED, ROUNDS = 20, 50


def host_us(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median microseconds until `call` returns."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(QUEUED):
            call()
        times.append((time.perf_counter() - started) / QUEUED * 1e6)
    # The first one compiles.
    return median(times[1:])


def rows(device: torch.device, length: int = 128, rounds: int = ROUNDS) -> list[dict]:
    """A row for each implementation: microseconds of a call forward, of one with backward, and their parts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, do = (torch.randn(1, length, 4, 64, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    log_decay = -torch.tensor([0.5, 0.1, 0.05, 0.01], device=device)
    result = []
    for name in ("tnllm", "fla"):
        provider = PROVIDERS[name]
        if provider.missing(device, dtype):
            continue

        def both(attend: Callable[..., Tensor] = provider.attend) -> object:
            return torch.autograd.grad(attend(q, k, v, log_decay), leaves, do)

        def forward(attend: Callable[..., Tensor] = provider.attend) -> object:
            with torch.no_grad():
                return attend(q, k, v, log_decay)

        row = {"provider": name, "forward": host_us(forward, device, rounds), "both": host_us(both, device, rounds)}
        result.append(row | (_parts(leaves, do, log_decay, row["both"], rounds) if name == "tnllm" else {}))
    return result


def _parts(leaves: list[Tensor], do: Tensor, log_decay: Tensor, both: float, rounds: int) -> dict[str, float]:
    q, k, v = (x.detach() for x in leaves)
    if q.is_cuda:
        from tnllm.kernels.lightning_attention import launch

        forward, backward = launch.triton_forward, launch.triton_backward
    else:
        forward, backward = chunk.chunk_forward, chunk.chunk_backward

    def launches() -> None:
        forward(q, k, v, log_decay, None, None)
        backward(do, None, q, k, v, log_decay, None, None)

    def operators() -> None:
        op._forward(q, k, v, log_decay)
        op._backward(do, None, q, k, v, log_decay, None, None)

    launch_us, op_us = (host_us(call, q.device, rounds) for call in (launches, operators))
    return {"launch": launch_us, "dispatch": op_us - launch_us, "autograd": both - op_us}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Host time of an eager call, in parts.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"environment": describe_device(device), "rows": rows(device, rounds=options.rounds)}
    print(environment_line(results["environment"]))
    columns = [("provider", "{provider}")]
    columns += [(key, f"{{{key}:.0f}}") for key in ("forward", "both", "launch", "dispatch", "autograd")]
    results["rows"] = [dict.fromkeys(("launch", "dispatch", "autograd")) | row for row in results["rows"]]
    print_table("host time of a call, microseconds", columns, results["rows"])
    if options.json:
        write_json(results, options.json)


if __name__ == "__main__":
    main()
