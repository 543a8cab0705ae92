"""`tnllm doctor`: what is installed, which GPUs there are, which path each kernel takes, and whether attention is right."""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tnllm.cli.options import AS_JSON, examples
from tnllm.errors import RunError, UserError

if TYPE_CHECKING:
    from tnllm.kernels.lightning_attention.launch import Device

EPILOG = examples("tnllm doctor --json")

# Import names of required packages, and of each extra.
REQUIRED = (
    "torch", "typer", "rich", "safetensors", "sentencepiece", "lm_eval", "numpy", "pydantic", "yaml", "jinja2",
)  # fmt: skip
EXTRAS = {
    "data": ("datatrove", "ftfy", "py3langid", "pyarrow", "zstandard", "rensa", "resiliparse"),
    "plot": ("matplotlib",),
    "track": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "schema": ("llguidance",),
    "hf": ("transformers", "tiktoken", "accelerate"),
    "bench": ("fla",),
    "onnx": ("onnx", "onnxruntime", "onnxscript", "transformers"),
    "quantize": ("torchao", "transformers"),
    "remote": ("fsspec", "aiohttp", "huggingface_hub", "s3fs", "gcsfs"),
}
# Distribution names where they differ from import names.
_DISTRIBUTIONS = {"yaml": "pyyaml", "fla": "fla-core", "lm_eval": "lm-eval"}
_MIN_FREE_GIB = 2.0
# Outputs of the self-check are sums of at most 100 products of unit normals: fp32 rounding is far below this limit, the
# error of a wrong decay, mask or state far above.
_MAX_ERROR = 1e-4
# Errors of a missing, half-installed or mismatched package when it is used.
_BREAKAGE = (ImportError, AttributeError, OSError, RuntimeError, UserError)


@dataclass(frozen=True)
class Check:
    """One line of the report. `status` is ok, note (works, with less) or wrong."""

    name: str
    status: str
    found: str
    remedy: str = ""


def command(as_json: bool = AS_JSON) -> None:
    """Check this installation: versions, GPUs, disk, extras, packaged files, the kernels' paths, and the attention itself.

    Exit 0 if usable, 1 with what is wrong.
    """
    checks = examine()
    wrong = [check for check in checks if check.status == "wrong"]
    if as_json:
        print(json.dumps({"usable": not wrong, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    if wrong:
        raise RunError(f"not usable: {'; '.join(f'{check.name}: {check.found}' for check in wrong)}")


def examine() -> list[Check]:
    """All checks; each runs even if another fails."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [Check("python", "ok", found)]
    checks += [_package(name) for name in REQUIRED]
    if sys.platform == "linux":
        checks.append(_package("triton"))
    if all(check.status == "ok" for check in checks if check.name == "torch"):
        checks += _guarded("cuda", _cuda)
    checks += _guarded("disk", _disk)
    checks += [_extra(name, packages) for name, packages in EXTRAS.items()]
    for name, check in (("assets", _assets), ("recipes", _recipes), ("attention", _attention), ("kernels", _kernels)):
        checks += _guarded(name, check)
    return checks


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """Run a check; a broken part of the installation becomes a line of the report."""
    try:
        return check()
    except _BREAKAGE as error:
        return [
            Check(name, "wrong", f"{type(error).__name__}: {error}", "reinstall: pip install --force-reinstall tnllm")
        ]


def _version(name: str) -> str:
    # Not at the top: it is a tenth of a second that `tnllm --help` would pay.
    import importlib.metadata

    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _package(name: str) -> Check:
    """Whether a required package imports: a broken shared library shows only then."""
    wanted = _DISTRIBUTIONS.get(name, name)
    try:
        importlib.import_module(name)
        return Check(name, "ok", _version(name))
    except ImportError as error:
        return Check(name, "wrong", f"cannot be imported: {error}", f"pip install {wanted}")
    except OSError as error:
        return Check(name, "wrong", f"is broken: {error}", f"pip install --force-reinstall {wanted}")


def _extra(extra: str, packages: tuple[str, ...]) -> Check:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return Check(f"extra {extra}", "note", f"missing {', '.join(missing)}", f"pip install 'tnllm[{extra}]'")
    return Check(f"extra {extra}", "ok", ", ".join(f"{name} {_version(name)}" for name in packages))


def _cuda() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [Check("cuda", "note", f"no GPU is seen ({built}); everything runs on the CPU, slowly")]
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        if properties.major < 8:
            checks.append(Check(f"cuda:{index}", "note", f"{text}; no bf16", "train with --set train.dtype=fp32"))
        else:
            checks.append(Check(f"cuda:{index}", "ok", f"{text}; bf16"))
    return checks


def _disk() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    text = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < _MIN_FREE_GIB:
        return [Check("disk", "note", text, "a run writes checkpoints here; choose another folder with --out")]
    return [Check("disk", "ok", text)]


def _assets() -> list[Check]:
    """Packaged files against their packaged list of hashes."""
    from tnllm import assets
    from tnllm.files import sha256_file

    folder = assets.folder()
    listing = folder / "SHA256SUMS"
    repair = "reinstall: pip install --force-reinstall tnllm"
    if not listing.is_file():
        return [Check("assets", "wrong", f"{listing} is missing", repair)]
    entries = [line.split(maxsplit=1) for line in listing.read_text("utf-8").splitlines()]
    bad = []
    for expected, name in entries:
        file = folder / name.lstrip("*")
        if not file.is_file():
            bad.append(f"{name} is missing")
        elif sha256_file(file) != expected:
            bad.append(f"{name} is damaged")
    if bad:
        return [Check("assets", "wrong", ", ".join(bad), repair)]
    return [Check("assets", "ok", f"{len(entries)} files, hashes as packaged")]


def _recipes() -> list[Check]:
    from tnllm.recipe import FOLDER, packaged_recipes
    from tnllm.training.config import load_recipe

    names = [path.stem for path in packaged_recipes()]
    for name in names:
        load_recipe(str(FOLDER / f"{name}.yaml"))
    if not names:
        return [Check("recipes", "wrong", f"none in {FOLDER}", "reinstall: pip install --force-reinstall tnllm")]
    return [Check("recipes", "ok", f"{len(names)}, all load")]


def _attention() -> list[Check]:
    """The attention of each device against the recurrent definition in float64."""
    import torch

    from tnllm.kernels.lightning_attention import lightning_attention
    from tnllm.kernels.lightning_attention.reference import recurrent

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 32, generator=generator) for _ in range(3))
    log_decay = torch.tensor([-0.5, 0.0])
    exact, exact_state = recurrent(q.double(), k.double(), v.double(), log_decay.double())
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    checks = []
    for device in devices:
        out, state = lightning_attention(q.to(device), k.to(device), v.to(device), log_decay.to(device))
        scale = max(exact.abs().max().item(), exact_state.abs().max().item())
        error = max((out.cpu() - exact).abs().max().item(), (state.cpu() - exact_state).abs().max().item()) / scale
        name, text = f"attention, {device}", f"within {error:.1e} of its definition"
        if not error < _MAX_ERROR:
            checks.append(Check(name, "wrong", text, "report this with the output of tnllm doctor --json"))
        else:
            checks.append(Check(name, "ok", text))
    return checks


def _kernels() -> list[Check]:
    import torch

    checks = [Check("kernels, cpu", "ok", "plain torch for all of them, attention in chunks of 64 tokens")]
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        text = "TRITON_INTERPRET=1: kernels run as Python, thousands of times slower"
        checks.append(Check("kernels, Triton", "note", text, "unset TRITON_INTERPRET but for tests"))
    for index in range(torch.cuda.device_count()):
        from tnllm.kernels.lightning_attention.launch import cuda_device

        checks += _gpu_kernels(f"cuda:{index}", cuda_device(index))
    return checks


def _gpu_kernels(name: str, device: "Device") -> list[Check]:
    from tnllm.kernels.lightning_attention.launch import attend_config

    def pipeline(width: int, itemsize: int) -> str:
        try:
            config = attend_config(width, width, itemsize, device, 16, dual=True)
        except ValueError:
            return "none: too little shared memory"
        loads = "tensor memory accelerator" if config.tma else "pointers"
        return f"chunks of {config.chunk}, stages {config.num_stages}, dk and dv by {loads}"

    rows = {
        "attention": f"Triton; bf16 at head dim 128: {pipeline(128, 2)}; at 256: {pipeline(256, 2)}",
        "attention in fp32": f"Triton; head dim 128: {pipeline(128, 4)}; 256: {pipeline(256, 4)}",
        "decoding": f"one row: the whole model in one persistent Triton kernel, {'' if device.has_tma else 'no '}bulk "
        "prefetch of weights; more rows or another form of model: a CUDA graph",
        "softmax layers": "torch's flash or cuDNN attention in bf16 and fp16, its plain one in fp32",
        "norm, gate, GLU, LRPE, loss": "Triton",
    }
    return [Check(f"{part}, {name}", "ok", text) for part, text in rows.items()]


def _print(checks: list[Check]) -> None:
    from tnllm.tables import print_table

    rows = [[check.status, check.name, check.found, check.remedy] for check in checks]
    styles = {"ok": "green", "note": "yellow", "wrong": "red"}
    print_table(["", "part", "found", "what to do"], rows, styles=styles)
