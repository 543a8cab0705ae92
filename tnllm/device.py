"""Which device a name means, and what a report says of it.

    device = pick_device("auto")        # torch.device("cuda") where there is a GPU, else torch.device("cpu")
    describe_device(device)             # {"torch": "2.13.0+cpu", "device": "cpu (x86_64), 2 threads", ...}
    data_sheet(device)                  # Gpu(80.0, 989e12, 3.35e12); None for a card that is not in GPUS, and a CPU

torch is imported inside, since commands that need no device must not pay for it.
"""

import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tnllm.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """A card by its vendor's data sheet: memory in GiB, dense bf16 FLOP/s, bytes/s of its memory, what drivers call it."""

    memory_gib: float
    peak_flops: float
    bandwidth: float
    names: tuple[str, ...] = ()


GPUS = {
    "h200": Gpu(141e9 / 2**30, 989e12, 4.8e12, ("H200",)),
    "h100": Gpu(80.0, 989e12, 3.35e12, ("H100 80GB HBM3",)),
    "a100-80g": Gpu(80.0, 312e12, 2.039e12, ("A100-SXM4-80GB",)),
    "a100-40g": Gpu(40.0, 312e12, 1.555e12, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "l40s": Gpu(48.0, 362e12, 0.864e12, ("L40S",)),
    "rtx4090": Gpu(24.0, 165e12, 1.008e12, ("RTX 4090", "GeForce RTX 4090")),
}


def data_sheet(device: "torch.device") -> Gpu | None:
    """What the data sheet says of a CUDA device; None for a CPU and for a card that is not in GPUS."""
    import torch

    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else ""
    # The whole name: an H100 with PCIe is another card than one with HBM3.
    return next((card for card in GPUS.values() if name in card.names), None)


def pick_device(name: str, option: str = "device") -> "torch.device":
    """Return the device that `name` means: `auto`, `cpu`, `cuda` or `cuda:N`; `option` names it in messages.

    `cuda:N` becomes the process's current device too, since Triton launches kernels on that one, wherever the tensors
    are. Raises UserError for any other name, and for a CUDA device that torch does not see.
    """
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not (number.isascii() and number.isdigit()))):
        raise UserError(f"{option} is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(number or 0) >= count:
        allowed = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(count))])
        raise UserError(f"{option} is {name!r}, but torch sees {count} CUDA devices here; allowed: {allowed}")
    if number:
        torch.cuda.set_device(int(number))
    return torch.device(name)


def describe_device(device: "torch.device") -> dict[str, Any]:
    """Device, versions and date, for the head of a report; of a GPU also its data sheet's rates, None if unknown."""
    import torch

    description = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device.type != "cuda":
        return description | {"device": f"cpu ({platform.machine()}), {torch.get_num_threads()} threads"}
    import triton

    card = data_sheet(device)
    return description | {
        "device": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "sheet_tflop_per_s": None if card is None else card.peak_flops / 1e12,
        "sheet_tb_per_s": None if card is None else card.bandwidth / 1e12,
    }
