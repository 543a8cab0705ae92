"""Memory of this machine: what is free, what was used, and a micro-batch that fits into it.

train = fit_memory(model, lora, train, parallel, seq_len, device, display.log)   # fewer rows in a pass, if they must
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from tnllm.errors import UserError
from tnllm.files import format_bytes
from tnllm.modeling.checkpointing import MODES
from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.training.estimate import RESERVE, estimate_memory
from tnllm.training.sections import ParallelSection, TrainSection

MEMINFO = Path("/proc/meminfo")  # Linux; elsewhere all of the machine's memory counts as free


def fit_memory(
    model: ModelConfig,
    lora: LoraConfig,
    train: TrainSection,
    parallel: ParallelSection,
    seq_len: int,
    device: torch.device,
    log: Callable[[str], None],
    free: float | None = None,
) -> TrainSection:
    """`train`, with a smaller micro_batch_size if the computed memory exceeds what is free on `device`.

    More passes make up for fewer rows, so an optimizer step sees the same tokens; only the order of fp32 sums
    changes. A change is reported through `log`. `free` is in bytes (None: `free_bytes(device)`). Raises UserError if not
    even one row fits.
    """
    free = (1 - RESERVE) * (free_bytes(device) if free is None else free)
    rows, low = train.micro_batch_size, device.type == "cuda"
    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        fitted = train.model_copy(update={"micro_batch_size": size})
        needed = estimate_memory(model, lora, fitted, parallel, seq_len, low_precision=low).total
        if needed <= free:
            if size < rows:
                log(f"train.micro_batch_size is {size} instead of {rows}, to fit into {format_bytes(free)} on {device}")
            return fitted
    modes = {mode: estimate_memory(model, lora, fitted, parallel, seq_len, mode, low).total for mode in MODES}
    fits = next((mode for mode in MODES if modes[mode] <= free), None)
    advice = "lower data.seq_len or take a smaller model"
    if fits is not None:
        advice = f"set train.activation_checkpointing={fits}, which needs {format_bytes(modes[fits])}"
    raise UserError(
        f"one row of {seq_len} tokens needs about {format_bytes(needed)}, and {format_bytes(free)} are free on "
        f"{device}; {advice}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory still available to a run: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"))
        if available is not None:
            return 1024 * int(available[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: the GPU allocator's, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
