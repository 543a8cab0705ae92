"""Checkpoints of a model on a mesh: the same folders as one process writes, so any mesh resumes what any mesh wrote.

    saver = ShardedSaver(run, keep=3, background=True, tokenizer=path, sharded=sharded)
    saver.save(state, sharded, optimizer)
    state = load_sharded(folder, sharded, optimizer)

Every rank of the first copy of the model owns some of the tensors: those are gathered whole on it, one after another, and
it writes them, so no rank holds or writes more than its share. A tensor in a file is a whole tensor. Reading, every rank
takes the slices it keeps straight from the files. All ranks must see the same run folder.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tnllm.errors import RunError
from tnllm.files import replace_dir, write_text_atomic
from tnllm.modeling.weights import CONFIG, TOKENIZER, config_json
from tnllm.parallel.layout import Layout
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.parallelize import ShardedModel
from tnllm.parallel.ranks import SharedError
from tnllm.training.checkpoint import (
    LATEST,
    MANIFEST,
    STATE,
    TrainState,
    file_sums,
    list_checkpoints,
    optimizer_tensors,
    step_name,
)

FOLDERS = ("model", "optimizer")


class ShardedSaver:
    """`checkpoint.Saver` for many ranks; every rank calls the same methods in the same order."""

    def __init__(self, run: Path, keep: int, background: bool, tokenizer: Path | None, sharded: ShardedModel) -> None:
        self.run, self.folder, self.keep, self.background = run, run / "checkpoints", keep, background
        self.tokenizer, self.mesh, self.group = tokenizer, sharded.mesh, sharded.mesh.groups["files"]
        if self.mesh.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp-*"):
                shutil.rmtree(leftover)
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(self, state: TrainState, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> None:
        """Gather everything now and write it, in the background if asked; waits for the write before."""
        self.wait()
        owned = {folder: dict(tensors) for folder, tensors in zip(FOLDERS, _gather(sharded, optimizer), strict=True)}
        if self.mesh.rank == 0:
            owned["optimizer"]["rng.cpu"] = torch.get_rng_state()
        model = sharded.model
        config = config_json(model.config, model.head_weight.dtype, model.lora)
        snapshot = TrainState(**asdict(state))
        if self.background:
            self._thread = threading.Thread(target=self._write, args=(snapshot, owned, config), name="checkpoint")
            self._thread.start()
        else:
            self._write(snapshot, owned, config)
            self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is on disk; raises RunError, on every rank, if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            failed = RunError(f"the checkpoint could not be written ({error}); the one before is intact")
            raise failed if self.mesh.rank == 0 else SharedError(str(failed), failed.exit_code)

    def _write(self, state: TrainState, owned: dict[str, dict[str, Tensor]], config: str) -> None:
        """Each rank its files, then rank 0 the rest. A rank's error is told to all, so that none waits for ever."""
        final = self.folder / step_name(state.step)
        aside = final.with_name(f"{final.name}.tmp-save")
        main = self.mesh.rank == 0
        begun = self._together(lambda: _make_folders(aside) if main else None)
        sums = None if begun is None else self._together(lambda: self._write_own(owned, aside))
        if sums is not None:
            self._together(lambda: self._finish(state, config, aside, final, sums) if main else None)
        if main:
            shutil.rmtree(aside, ignore_errors=True)

    def _write_own(self, owned: dict[str, dict[str, Tensor]], aside: Path) -> dict[str, Any]:
        for folder, tensors in owned.items():
            if tensors:
                save_file(tensors, aside / folder / f"rank-{self.mesh.rank:05d}.safetensors", metadata={"format": "pt"})
        mine = sorted(aside.glob(f"*/rank-{self.mesh.rank:05d}.safetensors"))
        for path in mine:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return file_sums(mine, aside)

    def _finish(self, state: TrainState, config: str, aside: Path, final: Path, sums: list[Any]) -> None:
        (aside / CONFIG).write_text(config, encoding="utf-8")
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, aside / TOKENIZER)
        (aside / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        whole = file_sums([path for path in aside.iterdir() if path.is_file()], aside)
        for part in sums:
            whole |= part
        (aside / MANIFEST).write_text(json.dumps(dict(sorted(whole.items())), indent=2) + "\n", encoding="utf-8")
        replace_dir(aside, final)
        write_text_atomic(self.run / LATEST, f"{final.name}\n")
        for old in list_checkpoints(self.run)[: -self.keep] if self.keep else []:
            shutil.rmtree(old)

    def _together(self, work: Any) -> list[Any] | None:
        """Do `work` on every rank and return all results; None where it failed on one, which is then kept."""
        mine: tuple[Any, str | None]
        try:
            mine = (work(), None)
        except Exception as error:  # whatever it is, the others must hear of it
            mine = (None, f"rank {self.mesh.rank}: {error}")
        everyone: list[Any] = [None] * self.mesh.world_size
        try:
            dist.all_gather_object(everyone, mine, group=self.group)
        except RuntimeError as error:  # the thread that asked raises it
            everyone = [(None, f"another rank was lost: {str(error).splitlines()[0]}")]
        self._error = self._error or next((error for _, error in everyone if error), None)
        return None if self._error else [result for result, _ in everyone]


def _make_folders(aside: Path) -> None:
    for name in FOLDERS:
        (aside / name).mkdir(parents=True)


def _tensors(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> list[dict[str, tuple[Tensor, Layout | None]]]:
    """Local tensors of the model and of the optimizer with their layouts (None: one number, alike on every rank)."""
    model: dict[str, tuple[Tensor, Layout | None]] = {
        name: (part.local.detach(), part.layout) for name, part in sharded.shards.items()
    }
    moments: dict[str, tuple[Tensor, Layout | None]] = {}
    for key, value in optimizer_tensors(sharded, optimizer).items():
        layout = sharded.shards[key.partition(".")[2]].layout
        moments[key] = (value, layout if value.ndim else None)
    return [model, moments]


def _gather(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The whole tensors this rank owns, on CPU, for each of the two folders. Ranks of other copies own none."""
    mesh = sharded.mesh
    load = [0] * mesh.groups["replica"].size()
    for tensors in _tensors(sharded, optimizer):
        yield _gather_all(tensors, mesh, load)


def _gather_all(
    tensors: dict[str, tuple[Tensor, Layout | None]], mesh: Mesh, load: list[int]
) -> Iterator[tuple[str, Tensor]]:
    if mesh.index["replicate"] != 0:
        return
    group = mesh.groups["replica"]
    place = dist.get_rank(group)
    for name, (local, layout) in tensors.items():
        # The owner is the rank that has the least so far; all ranks count alike.
        owner = load.index(min(load))
        if layout is None:
            load[owner] += 1
            if owner == place:
                yield name, local.cpu().clone()
            continue
        load[owner] += torch.Size(layout.full_shape).numel()
        layouts = [_layout_at(layout, mesh, rank) for rank in range(group.size())]
        room = max(torch.Size(other.local_shape).numel() for other in layouts)
        flat = local.new_zeros(room)
        flat[: local.numel()] = local.flatten()
        parts = [torch.empty_like(flat) for _ in layouts] if owner == place else None
        dist.gather(flat, parts, dst=dist.get_global_rank(group, owner), group=group)
        if parts is not None:
            whole = torch.empty(layout.full_shape, dtype=local.dtype)
            for part, other in zip(parts, layouts, strict=True):
                shaped = part[: torch.Size(other.local_shape).numel()].view(other.local_shape)
                for mine, slices in other.slices():
                    whole[slices] = shaped[mine].to("cpu")
            yield name, whole


def _layout_at(layout: Layout, mesh: Mesh, rank: int) -> Layout:
    """The layout of the same parameter on another rank of this copy of the model."""
    weights, tensor = divmod(rank, mesh.tensor[1])
    other = Layout.of(layout.name, layout.full_shape, (tensor, mesh.tensor[1]))
    return other if layout.rows is None else other.with_rows((weights, mesh.weights[1]))


def load_sharded(folder: Path, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fill this rank's part of model and optimizer from a checkpoint of any mesh; returns where the run was.

    The checkpoint must be of the same model (`check_same_model`).
    """
    for name, tensors in zip(FOLDERS, _tensors(sharded, optimizer), strict=True):
        _fill(tensors, folder / name)
    return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def _fill(tensors: dict[str, tuple[Tensor, Layout | None]], folder: Path) -> None:
    """Copy this rank's slices of the whole tensors in `folder`'s safetensors files."""
    with ExitStack() as stack, torch.no_grad():
        where = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            where.update(dict.fromkeys(file.keys(), file))
        for key, (local, layout) in tensors.items():
            if key not in where:
                raise RunError(f"{folder} has no tensor {key}; it holds another model")
            if layout is None:
                local.copy_(where[key].get_tensor(key))
                continue
            stored = where[key].get_slice(key)
            for mine, slices in layout.slices():
                local[mine].copy_(stored[slices])
