"""Checkpoints a run can be killed at any moment of, and resumed from exactly.

    saver = Saver(run / "checkpoints", keep=3)
    saver.save(state, model, optimizer)               # snapshot now, write in the background
    folder = find_checkpoint(run, "auto")             # the newest whole one, or None
    state = load_checkpoint(folder, model, optimizer)

A step folder holds `model/` and `optimizer/` (torch.distributed.checkpoint over safetensors, readable by any number of
ranks), `config.json` and `tokenizer.model` (so the folder can be generated from), `state.json` (step, samples, tokens) and
`manifest.json` (size and SHA-256 of every other file). It is written aside, flushed, renamed; then `latest` is replaced.
Nothing is pickled.
"""

import hashlib
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
from tnllm.files import replace_dir, write_text_atomic
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import CONFIG, TOKENIZER, config_json, plain_errors, read_lora
from tnllm.training.optim import Parameters

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


@dataclass
class TrainState:
    """Where a run is: updates made, global samples drawn, tokens seen, updates refused in all."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0


def step_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


class Saver:
    """Writes checkpoints one at a time, keeps the newest `keep` (0: all), and reports a failed write at the next call."""

    def __init__(self, run: Path, keep: int, background: bool, tokenizer: Path | None) -> None:
        self.run, self.folder, self.keep, self.background = run, run / "checkpoints", keep, background
        self.tokenizer = tokenizer
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp-*"):
            shutil.rmtree(leftover)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        """Copy everything now and write it, in the background if asked; waits for the write before."""
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
        """Return once the last checkpoint is on disk; raises RunError if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RunError(f"the checkpoint could not be written ({error}); the one before is intact") from error

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # all of it is carried to the thread that asked, which raises it
            self._error = error

    def _write(self, state: TrainState, tensors: dict[str, Tensor], moments: dict[str, Tensor], config: str) -> None:
        final = self.folder / step_name(state.step)
        aside = final.with_name(f"{final.name}.tmp-save")
        try:
            aside.mkdir()
            _save_tensors(tensors, aside / "model")
            _save_tensors(moments, aside / "optimizer")
            (aside / CONFIG).write_text(config, encoding="utf-8")
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, aside / TOKENIZER)
            (aside / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            sums = file_sums(sorted(path for path in aside.rglob("*") if path.is_file()), aside)
            (aside / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
            replace_dir(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        write_text_atomic(self.run / LATEST, f"{final.name}\n")
        if self.keep:
            for old in list_checkpoints(self.run)[: -self.keep]:
                shutil.rmtree(old)


def optimizer_tensors(model: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by name of the trained parameters, created where no update has been made yet."""
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
        warnings.simplefilter("ignore", UserWarning)  # one process is what we mean
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with plain_errors():
            dcp.save(tensors, storage_writer=writer, no_dist=True)


def _load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with plain_errors():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def file_sums(files: list[Path], folder: Path) -> dict[str, list[int | str]]:
    """What a manifest says of `files`: size and SHA-256, by path relative to `folder`."""
    return {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(run: Path) -> list[Path]:
    """Step folders, oldest first; one that is being written has another name."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if ".tmp-" not in path.name)


def verify_checkpoint(folder: Path) -> None:
    """Raise RunError naming the first file that is missing, cut short or changed."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise RunError(f"{folder} has no {MANIFEST}; it is not a whole checkpoint")
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
        if _sha256(file) != digest:
            raise RunError(f"{file} was changed after it was written (SHA-256 differs)")


def find_checkpoint(run: Path, resume: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, verified.

    `resume` "auto": the newest whole one of `run`, older ones taking the place of damaged ones (`warn` says so), None
    where there is none at all. Otherwise a step folder or a run folder; damaged or missing raises an error.
    """
    if resume != "auto":
        named = Path(resume)
        folder = named if (named / MANIFEST).is_file() else _latest(named)
        if folder is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run folder, a step folder or auto")
        verify_checkpoint(folder)
        return folder
    there = list_checkpoints(run)
    for folder in reversed(there):
        try:
            verify_checkpoint(folder)
        except RunError as error:
            warn(f"checkpoint {folder.name} cannot be used: {error}; trying the one before")
            continue
        return folder
    if there:
        # To start anew would quietly throw the run away.
        raise RunError(f"no checkpoint in {run / 'checkpoints'} can be used; move that folder away to start anew")
    return None


def _latest(run: Path) -> Path | None:
    latest = run / LATEST
    if latest.is_file():
        return run / "checkpoints" / latest.read_text(encoding="utf-8").strip()
    return None


def load_checkpoint(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fill model, optimizer and random state in place; returns where the run was."""
    check_same_model(folder, model)
    with torch.no_grad():
        tensors = dict(model.state_dict())
        moments = optimizer_tensors(model, optimizer)
        moments["rng.cpu"] = torch.get_rng_state()
        _load_tensors(tensors, folder / "model")
        _load_tensors(moments, folder / "optimizer")
    torch.set_rng_state(moments["rng.cpu"])
    return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def check_same_model(folder: Path, model: LanguageModel) -> None:
    """Raise UserError where the checkpoint `folder` was trained with another model or another adapter."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
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
