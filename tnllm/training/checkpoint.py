"""Crash-safe checkpoints: a run killed at any time resumes exactly, on any number of ranks.

    saver = Saver(run, keep=3, background=True, tokenizer=path)
    saver.save(state, model, optimizer)               # snapshot now, write in the background
    folder = find_checkpoint(run, "auto", log=print)  # the newest complete one, or None
    state = load_checkpoint(folder, model, optimizer)

A step folder holds what `contents` lists as full tensors (`model/` and `optimizer/`, safetensors that
torch.distributed.checkpoint reads too), `config.json` and `tokenizer.model` (so the folder can be generated from),
`state.json` (`TrainState`) and `manifest.json` (size and SHA-256 of every other file). It is written as a temporary
folder, flushed and renamed; then `latest` is replaced. Nothing is pickled.

On a mesh every rank makes the same calls in the same order. Each rank of the first copy of the model owns some tensors
(`_gather_full`) and writes them, so none holds or writes more than its share. When loading, every rank reads its own
slices. All ranks must see the same run folder.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnllm.errors import RunError, UserError
from tnllm.files import read_json, replace_dir, sha256_file, write_text_atomic
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.weights import CONFIG, TOKENIZER, config_json, latest_step, read_lora
from tnllm.parallel.layout import Layout
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.ranks import SingleProcess

if TYPE_CHECKING:
    from tnllm.parallel.parallelize import ShardedModel

    AnyModel = LanguageModel | ShardedModel

# A tensor on this rank and its layout; None: complete, and equal on every rank.
Local = tuple[Tensor, Layout | None]
MANIFEST, STATE, RECIPE, LATEST = "manifest.json", "state.json", "recipe.json", "latest"


@dataclass
class TrainState:
    """Where a run is: updates made, samples and tokens consumed by all ranks, updates refused (all, and in a row).

    `recent_losses`: what a spike is measured by. `owed`: names of hooks that were due when a signal stopped the run.
    `guard`: the last losses and norms that train.spikes compares with. `data`: the fingerprint of the training data.
    `streams`: where each source that is tokenized while it is read continues.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)
    guard: list[list[float]] = field(default_factory=list)
    data: str = ""
    streams: list[dict[str, Any] | None] = field(default_factory=list)


def contents(model: "AnyModel", optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Local]]:
    """Folder → name → the tensors of a checkpoint on this rank, each with its layout (None: complete on every rank).

    Loading copies into the same tensors, and makes `rng.cpu` the state of torch's generator. AdamW's moments and step
    counts are named by parameter; zeros are created before the first update.
    """
    layouts = {} if isinstance(model, LanguageModel) else {name: shard.layout for name, shard in model.shards.items()}
    weights: dict[str, Local] = {}
    moments: dict[str, Local] = {"rng.cpu": (torch.get_rng_state(), None)}
    for name, parameter in model.named_parameters():
        weights[name] = (parameter.detach(), layouts.get(name))
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        moments |= {f"{key}.{name}": (value, layouts.get(name) if value.ndim else None) for key, value in state.items()}
    return {"model": weights, "optimizer": moments}


def step_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


class Saver:
    """Writes one checkpoint at a time and keeps the newest `keep` (0: all). A failed write is raised by the next call."""

    def __init__(
        self,
        run: Path,
        keep: int,
        background: bool,
        tokenizer: Path | None,
        ranks: SingleProcess | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.folder, self.keep, self.background = run, run / "checkpoints", keep, background
        self.tokenizer, self.ranks, self.recipe = tokenizer, ranks or SingleProcess(), recipe
        if self.ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Left unfinished by a killed process.
            for leftover in self.folder.glob("step-*.tmp-*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(self, state: TrainState, model: "AnyModel", optimizer: torch.optim.Optimizer) -> None:
        """Copy everything now and write it, in a background thread if so configured; first waits for the previous write."""
        self.wait()
        owned = _gather_full(contents(model, optimizer), None if isinstance(model, LanguageModel) else model.mesh)
        full = model if isinstance(model, LanguageModel) else model.model
        described = {
            CONFIG: config_json(full.config, full.head_weight.dtype, full.lora),
            STATE: json.dumps(asdict(state), indent=2) + "\n",
            **({RECIPE: json.dumps(self.recipe, indent=2) + "\n"} if self.recipe else {}),
        }
        self._thread = threading.Thread(
            target=self._write, args=(step_name(state.step), owned, described), name="checkpoint"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is on disk. Raises RunError, on every rank, if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            failed = RunError(f"the checkpoint could not be written ({error}); the one before is intact")
            raise self.ranks.as_shared_error(failed)

    def _write(self, name: str, owned: dict[str, dict[str, Tensor]], described: dict[str, str]) -> None:
        """Each rank writes its files, then rank 0 the rest. An error on one rank is sent to all, so that none hangs."""
        final = self.folder / name
        temporary = final.with_name(f"{name}.tmp-save")
        main = self.ranks.main

        def make_folders() -> None:
            for part in owned if main else ():
                (temporary / part).mkdir(parents=True)

        started = self._on_all_ranks(make_folders)
        sums = None if started is None else self._on_all_ranks(lambda: self._write_own(owned, temporary))
        if sums is not None:
            self._on_all_ranks(lambda: self._finish(described, temporary, final, sums) if main else None)
        if main:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_own(self, owned: dict[str, dict[str, Tensor]], temporary: Path) -> dict[str, Any]:
        files = []
        for folder, tensors in owned.items():
            if tensors:
                files.append(temporary / folder / f"rank-{self.ranks.rank:05d}.safetensors")
                save_file(tensors, files[-1], metadata={"format": "pt"})
                with open(files[-1], "rb") as file:
                    os.fsync(file.fileno())
        return _file_sums(files, temporary)

    def _finish(self, described: dict[str, str], temporary: Path, final: Path, sums: list[Any]) -> None:
        for name, text in described.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, temporary / TOKENIZER)
        manifest = _file_sums([path for path in temporary.iterdir() if path.is_file()], temporary)
        for rank_sums in sums:
            manifest |= rank_sums
        text = json.dumps(dict(sorted(manifest.items())), indent=2) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        replace_dir(temporary, final)
        write_text_atomic(self.run / LATEST, f"{final.name}\n")
        for old in list_checkpoints(self.run)[: -self.keep] if self.keep else []:
            shutil.rmtree(
                old, ignore_errors=True
            )  # a link, or a file that another user owns: what stays is still valid

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any] | None:
        """Call `work` on every rank and return all results. If it failed on one: keeps the error and returns None."""
        mine: tuple[Any, str | None]
        try:
            mine = (work(), None)
        except Exception as error:  # any failure must reach the other ranks, and the main thread
            mine = (None, _reason(error) if self.ranks.size == 1 else f"rank {self.ranks.rank}: {_reason(error)}")
        try:
            everyone = self.ranks.gather_in_background(mine)
        except RuntimeError as error:
            everyone = [(None, f"another rank was lost: {str(error).splitlines()[0]}")]
        self._error = self._error or next((error for _, error in everyone if error), None)
        return None if self._error else [result for result, _ in everyone]


def _gather_full(tensors: dict[str, dict[str, Local]], mesh: Mesh | None) -> dict[str, dict[str, Tensor]]:
    """Copies on CPU of the full tensors this rank owns, in the same folders; all of them where there is no mesh.

    Ranks of other copies of the model own none.
    """
    if mesh is None:
        return {
            folder: {name: local.detach().cpu().clone().contiguous() for name, (local, _) in items.items()}
            for folder, items in tensors.items()
        }
    owned: dict[str, dict[str, Tensor]] = {folder: {} for folder in tensors}
    if mesh.index["replicate"] != 0:
        return owned
    group = mesh.groups["replica"]
    load, rank = [0] * group.size(), dist.get_rank(group)
    for folder, items in tensors.items():
        for name, (local, layout) in items.items():
            # The owner is the rank with the fewest values so far; every rank computes the same.
            owner = load.index(min(load))
            load[owner] += 1 if layout is None else torch.Size(layout.full_shape).numel()
            full = local.cpu().clone() if layout is None else _gather_tensor(local, layout, mesh, owner)
            if full is not None and owner == rank:
                owned[folder][name] = full
    return owned


def _gather_tensor(local: Tensor, layout: Layout, mesh: Mesh, owner: int) -> Tensor | None:
    """The full tensor on rank `owner` of the group, None on the others."""
    group = mesh.groups["replica"]
    layouts = []  # of the same parameter on each rank
    for rank in range(group.size()):
        weights, tensor = divmod(rank, mesh.tensor[1])
        other = Layout.of(layout.name, layout.full_shape, (tensor, mesh.tensor[1]))
        layouts.append(other if layout.rows is None else other.with_rows((weights, mesh.weights[1])))
    # gather needs equal sizes: shorter shards are padded.
    flat = local.new_zeros(max(torch.Size(other.local_shape).numel() for other in layouts))
    flat[: local.numel()] = local.flatten()
    shards = [torch.empty_like(flat) for _ in layouts] if owner == dist.get_rank(group) else None
    dist.gather(flat, shards, dst=dist.get_global_rank(group, owner), group=group)
    if shards is None:
        return None
    full = torch.empty(layout.full_shape, dtype=local.dtype)
    for shard, other in zip(shards, layouts, strict=True):
        shaped = shard[: torch.Size(other.local_shape).numel()].view(other.local_shape)
        for mine, slices in other.slices():
            full[slices] = shaped[mine].to("cpu")
    return full


def _reason(error: Exception) -> str:
    """The system's words for a failed write, which safetensors wraps in its own."""
    system = re.search(r"I/O error: (.*) \(os error [0-9]+\)", str(error))
    return system[1] if system else str(error)


def _file_sums(files: list[Path], folder: Path) -> dict[str, list[int | str]]:
    """The manifest's entries for `files`: size and SHA-256, by path relative to `folder`."""
    return {str(path.relative_to(folder)): [path.stat().st_size, sha256_file(path)] for path in files}


def list_checkpoints(run: Path) -> list[Path]:
    """Step folders, oldest first. One that is still being written has a temporary name and is not listed."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name) and path.is_dir())


def verify_checkpoint(folder: Path) -> None:
    """Raise RunError naming the first file that is missing, cut short or changed."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise RunError(f"{folder} has no {MANIFEST}; it is not a complete checkpoint")
    try:
        sums = json.loads(manifest.read_bytes())
        entries = [(Path(name), int(size), str(digest)) for name, (size, digest) in sums.items()]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise RunError(f"{manifest} is damaged") from None
    outside = any(name.is_absolute() or ".." in name.parts for name, _, _ in entries)
    if outside or not {STATE, CONFIG} <= {str(name) for name, _, _ in entries}:
        raise RunError(f"{manifest} is damaged: it does not list the files of a checkpoint")
    for name, size, digest in entries:
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
        named, name = Path(resume), latest_step(Path(resume))
        folder = named if (named / MANIFEST).is_file() else named / "checkpoints" / name if name else None
        if folder is not None:
            verify_checkpoint(folder)
            return folder
        if not list_checkpoints(named):
            raise UserError(f"--resume {resume}: no checkpoint there; give a run folder, a step folder or auto")
        log(f"{named / LATEST} is missing or damaged, trying the newest step folder")
        run = named
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


def load_checkpoint(folder: Path, model: "AnyModel", optimizer: torch.optim.Optimizer) -> TrainState:
    """Load model, optimizer and random state in place, of a checkpoint from any mesh; returns where the run was.

    The checkpoint must be of the same model (`check_same_model`).
    """
    everything = contents(model, optimizer)
    for name, tensors in everything.items():
        _load_slices(tensors, folder / name)
    torch.set_rng_state(everything["optimizer"]["rng.cpu"][0])
    return read_state(folder)


def read_state(folder: Path) -> TrainState:
    """The state of the run in a checkpoint; fields that it does not have get their defaults."""
    values = read_json(folder / STATE)
    return TrainState(**{item.name: values[item.name] for item in fields(TrainState) if item.name in values})


def _load_slices(tensors: dict[str, Local], folder: Path) -> None:
    """Copy this rank's slices of the full tensors in `folder`'s safetensors files."""
    with ExitStack() as stack, torch.no_grad():
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))
        for key, (local, layout) in tensors.items():
            if key not in files:
                raise RunError(f"{folder} has no tensor {key}; it holds another model")
            if layout is None:
                local.copy_(files[key].get_tensor(key))
                continue
            stored = files[key].get_slice(key)
            for mine, slices in layout.slices():
                local[mine].copy_(stored[slices])


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
