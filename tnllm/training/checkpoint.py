"""Crash-safe checkpoints: a run killed at any time resumes exactly.

    saver = Saver(run, keep=3, background=True, tokenizer=path)
    saver.save(state, model, optimizer)               # snapshot now, write in the background
    folder = find_checkpoint(run, "auto", log=print)  # the newest complete one, or None
    state = load_checkpoint(folder, model, optimizer)

A step folder holds `model/` and `optimizer/` (torch.distributed.checkpoint over safetensors, readable by any number of
ranks), `config.json` and `tokenizer.model` (so the folder can be generated from), `state.json` (step, samples, tokens) and
`manifest.json` (size and SHA-256 of every other file). It is written as a temporary folder, flushed and renamed; then
`latest` is replaced.
Nothing is pickled.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from tnllm.errors import RunError, UserError
from tnllm.files import read_json, sha256_file, write_text_atomic, written_folder
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import CONFIG, TOKENIZER, config_json, plain_errors, read_lora
from tnllm.training.optim import Parameters

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


@dataclass
class TrainState:
    """Where a run is: updates made, samples and tokens consumed by all ranks, updates refused."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0


def step_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


class Saver:
    """Writes one checkpoint at a time and keeps the newest `keep` (0: all). A failed write is raised by the next call."""

    def __init__(self, run: Path, keep: int, background: bool, tokenizer: Path | None) -> None:
        self.run, self.folder, self.keep, self.background = run, run / "checkpoints", keep, background
        self.tokenizer = tokenizer
        remove_unfinished(self.folder)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        """Copy everything now and write it, in a background thread if so configured; first waits for the previous write."""
        self.wait()
        tensors = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        moments = {name: value.cpu().clone() for name, value in optimizer_tensors(model, optimizer).items()}
        moments["rng.cpu"] = torch.get_rng_state()
        config = config_json(model.config, model.head_weight.dtype, model.lora)
        snapshot = TrainState(**asdict(state))

        def write() -> None:
            self._write(snapshot, tensors, moments, config)

        if self.background:
            self._thread = threading.Thread(target=self._guard, args=(write,), name="checkpoint")
            self._thread.start()
        else:
            self._guard(write)
            self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is on disk. Raises RunError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RunError(f"the checkpoint could not be written ({error}); the one before is intact") from error

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # raised by `wait` in the main thread
            self._error = error

    def _write(self, state: TrainState, tensors: dict[str, Tensor], moments: dict[str, Tensor], config: str) -> None:
        final = self.folder / step_name(state.step)
        with written_folder(final) as temporary:
            _save_tensors(tensors, temporary / "model")
            _save_tensors(moments, temporary / "optimizer")
            write_description(temporary, state, config, self.tokenizer)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            write_manifest(temporary, file_sums(files, temporary))
        publish_checkpoint(final, self.run, self.keep)


def write_description(folder: Path, state: TrainState, config: str, tokenizer: Path | None) -> None:
    """Write what a checkpoint holds beside its tensors: state.json, config.json and the tokenizer."""
    (folder / CONFIG).write_text(config, encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    (folder / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, sums: dict[str, list[int | str]]) -> None:
    """Write `file_sums` of a checkpoint's files into it."""
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def publish_checkpoint(folder: Path, run: Path, keep: int) -> None:
    """Make the complete `folder` the run's `latest`, and remove all but the newest `keep` (0: none)."""
    write_text_atomic(run / LATEST, f"{folder.name}\n")
    for old in list_checkpoints(run)[:-keep] if keep else []:
        shutil.rmtree(old)


def remove_unfinished(checkpoints: Path) -> None:
    """Create the folder of checkpoints, or remove what a killed process left unfinished in it."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints.glob("*.tmp-*"):
        shutil.rmtree(leftover)


def optimizer_tensors(model: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter name; zeros are created before the first update."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors.update({f"{key}.{name}": value for key, value in state.items()})
    return tensors


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that only one process saves is intended
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with plain_errors():
            dcp.save(tensors, storage_writer=writer, no_dist=True)


def _load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with plain_errors():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def file_sums(files: list[Path], folder: Path) -> dict[str, list[int | str]]:
    """The manifest's entries for `files`: size and SHA-256, by path relative to `folder`."""
    return {str(path.relative_to(folder)): [path.stat().st_size, sha256_file(path)] for path in files}


def list_checkpoints(run: Path) -> list[Path]:
    """Step folders, oldest first. One that is still being written has a temporary name and is not listed."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if ".tmp-" not in path.name)


def verify_checkpoint(folder: Path) -> None:
    """Raise RunError naming the first file that is missing, cut short or changed."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise RunError(f"{folder} has no {MANIFEST}; it is not a complete checkpoint")
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{manifest} is damaged") from None
    for name, (size, digest) in sums.items():
        file = folder / name
        if not file.is_file():
            raise RunError(f"{file} is missing")
        if file.stat().st_size != size:
            raise RunError(f"{file} has {file.stat().st_size} bytes, not the {size} that were written")
        if sha256_file(file) != digest:
            raise RunError(f"{file} was changed after it was written (SHA-256 differs)")


def find_checkpoint(run: Path, resume: str, log: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, verified.

    `resume` "auto": the newest intact one of `run` (damaged ones are skipped and reported through `log`), None if the run
    has no checkpoint. Otherwise a step folder or a run folder, and an error if its checkpoint is damaged or missing.
    """
    if resume != "auto":
        named = Path(resume)
        folder = named if (named / MANIFEST).is_file() else _latest(named)
        if folder is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run folder, a step folder or auto")
        verify_checkpoint(folder)
        return folder
    checkpoints = list_checkpoints(run)
    for folder in reversed(checkpoints):
        try:
            verify_checkpoint(folder)
        except RunError as error:
            log(f"checkpoint {folder.name} cannot be used: {error}; trying the one before")
            continue
        return folder
    if checkpoints:
        # Starting over would silently discard the run.
        raise RunError(f"no checkpoint in {run / 'checkpoints'} can be used; move that folder away to start a new run")
    return None


def _latest(run: Path) -> Path | None:
    latest = run / LATEST
    if latest.is_file():
        return run / "checkpoints" / latest.read_text(encoding="utf-8").strip()
    return None


def load_checkpoint(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load model, optimizer and random state in place; returns where the run was."""
    check_same_model(folder, model)
    with torch.no_grad():
        tensors = dict(model.state_dict())
        moments = optimizer_tensors(model, optimizer)
        moments["rng.cpu"] = torch.get_rng_state()
        _load_tensors(tensors, folder / "model")
        _load_tensors(moments, folder / "optimizer")
    torch.set_rng_state(moments["rng.cpu"])
    return TrainState(**read_json(folder / STATE))


def check_same_model(folder: Path, model: LanguageModel) -> None:
    """Raise UserError if the checkpoint `folder` is of another model or another adapter."""
    config = read_json(folder / CONFIG)["model"]
    ours = model.config.model_dump()
    changed = [key for key in ours if config.get(key, ours[key]) != ours[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"model.{key} is {ours[key]!r}, but {folder.name} was trained with {config[key]!r}; "
            "a resumed run keeps its model (start a new one with another --out)"
        )
    if read_lora(folder) != model.lora:
        raise UserError(
            f"lora is not as in {folder.name}; a resumed run keeps its adapter (start a new one with another --out)"
        )
