"""Which device a name means, and what a report says of it.

    device = pick_device("auto")        # torch.device("cuda") where there is a GPU, else torch.device("cpu")
    describe_device(device)             # {"torch": "2.13.0+cpu", "device": "cpu (x86_64), 2 threads", ...}

torch is imported inside, since commands that need no device must not pay for it.
"""

import platform
import time
from typing import TYPE_CHECKING

from tnllm.errors import UserError

if TYPE_CHECKING:
    import torch


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


def describe_device(device: "torch.device") -> dict[str, str]:
    """Device, versions and date, for the head of a report."""
    import torch

    description = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device.type != "cuda":
        return description | {"device": f"cpu ({platform.machine()}), {torch.get_num_threads()} threads"}
    import triton

    return description | {
        "device": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }
