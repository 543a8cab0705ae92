"""Checkpoints of a model on a mesh: the same folders as one process writes, so any mesh resumes what any mesh wrote.

    saver = ShardedSaver(run, keep=3, background=True, tokenizer=path, sharded=sharded)
    saver.save(state, sharded, optimizer)
    state = load_sharded(folder, sharded, optimizer)

Every rank of the first copy of the model owns some of the tensors: they are gathered on it in full, one after another, and
it writes them, so no rank holds or writes more than its share. Files hold full tensors. When loading, every rank reads its
own slices from the files. All ranks must see the same run folder.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
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
from tnllm.files import read_json, replace_dir
from tnllm.modeling.weights import config_json
from tnllm.parallel.layout import Layout
from tnllm.parallel.mesh import Mesh
from tnllm.parallel.parallelize import ShardedModel
from tnllm.parallel.ranks import SharedError
from tnllm.training.checkpoint import (
    STATE,
    TrainState,
    file_sums,
    optimizer_tensors,
    publish_checkpoint,
    remove_unfinished,
    step_name,
    write_description,
    write_manifest,
)

FOLDERS = ("model", "optimizer")


class ShardedSaver:
    """`checkpoint.Saver` for many ranks; every rank calls the same methods in the same order."""

    def __init__(self, run: Path, keep: int, background: bool, tokenizer: Path | None, sharded: ShardedModel) -> None:
        self.run, self.folder, self.keep, self.background = run, run / "checkpoints", keep, background
        self.tokenizer, self.mesh, self.group = tokenizer, sharded.mesh, sharded.mesh.groups["files"]
        if self.mesh.rank == 0:
            remove_unfinished(self.folder)
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(self, state: TrainState, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> None:
        """Gather everything now and write it, in a background thread if configured; first waits for the previous write."""
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
        """Return once the last checkpoint is on disk. Raises RunError, on every rank, if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            failed = RunError(f"the checkpoint could not be written ({error}); the one before is intact")
            raise failed if self.mesh.rank == 0 else SharedError(str(failed), failed.exit_code)

    def _write(self, state: TrainState, owned: dict[str, dict[str, Tensor]], config: str) -> None:
        """Each rank writes its files, then rank 0 the rest. An error on one rank is sent to all, so that none hangs."""
        final = self.folder / step_name(state.step)
        temporary = final.with_name(f"{final.name}.tmp-save")
        main = self.mesh.rank == 0
        started = self._on_all_ranks(lambda: _make_folders(temporary) if main else None)
        sums = None if started is None else self._on_all_ranks(lambda: self._write_own(owned, temporary))
        if sums is not None:
            self._on_all_ranks(lambda: self._finish(state, config, temporary, final, sums) if main else None)
        if main:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_own(self, owned: dict[str, dict[str, Tensor]], temporary: Path) -> dict[str, Any]:
        name = f"rank-{self.mesh.rank:05d}.safetensors"
        for folder, tensors in owned.items():
            if tensors:
                save_file(tensors, temporary / folder / name, metadata={"format": "pt"})
        mine = sorted(temporary.glob(f"*/{name}"))
        for path in mine:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return file_sums(mine, temporary)

    def _finish(self, state: TrainState, config: str, temporary: Path, final: Path, sums: list[Any]) -> None:
        write_description(temporary, state, config, self.tokenizer)
        manifest = file_sums([path for path in temporary.iterdir() if path.is_file()], temporary)
        for rank_sums in sums:
            manifest |= rank_sums
        write_manifest(temporary, dict(sorted(manifest.items())))
        replace_dir(temporary, final)
        publish_checkpoint(final, self.run, self.keep)

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any] | None:
        """Call `work` on every rank and return all results. If it failed on one: keeps the error and returns None."""
        mine: tuple[Any, str | None]
        try:
            mine = (work(), None)
        except Exception as error:  # any failure must reach the other ranks
            mine = (None, f"rank {self.mesh.rank}: {error}")
        everyone: list[Any] = [None] * self.mesh.world_size
        try:
            dist.all_gather_object(everyone, mine, group=self.group)
        except RuntimeError as error:  # raised by `wait` in the main thread
            everyone = [(None, f"another rank was lost: {str(error).splitlines()[0]}")]
        self._error = self._error or next((error for _, error in everyone if error), None)
        return None if self._error else [result for result, _ in everyone]


def _make_folders(temporary: Path) -> None:
    for name in FOLDERS:
        (temporary / name).mkdir(parents=True)


def _tensors(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> list[dict[str, tuple[Tensor, Layout | None]]]:
    """Local tensors of the model and of the optimizer with their layouts (None: a scalar, equal on every rank)."""
    model: dict[str, tuple[Tensor, Layout | None]] = {
        name: (shard.local.detach(), shard.layout) for name, shard in sharded.shards.items()
    }
    moments: dict[str, tuple[Tensor, Layout | None]] = {}
    for key, value in optimizer_tensors(sharded, optimizer).items():
        layout = sharded.shards[key.partition(".")[2]].layout
        moments[key] = (value, layout if value.ndim else None)
    return [model, moments]


def _gather(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The full tensors this rank owns, on CPU, for each of the two folders. Ranks of other copies own none."""
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
    rank_in_group = dist.get_rank(group)
    for name, (local, layout) in tensors.items():
        # The owner is the rank with the fewest values so far; every rank computes the same.
        owner = load.index(min(load))
        if layout is None:
            load[owner] += 1
            if owner == rank_in_group:
                yield name, local.cpu().clone()
            continue
        load[owner] += torch.Size(layout.full_shape).numel()
        layouts = [_layout_at(layout, mesh, rank) for rank in range(group.size())]
        # gather needs equal sizes: shorter shards are padded.
        flat = local.new_zeros(max(torch.Size(other.local_shape).numel() for other in layouts))
        flat[: local.numel()] = local.flatten()
        shards = [torch.empty_like(flat) for _ in layouts] if owner == rank_in_group else None
        dist.gather(flat, shards, dst=dist.get_global_rank(group, owner), group=group)
        if shards is not None:
            full = torch.empty(layout.full_shape, dtype=local.dtype)
            for shard, other in zip(shards, layouts, strict=True):
                shaped = shard[: torch.Size(other.local_shape).numel()].view(other.local_shape)
                for mine, slices in other.slices():
                    full[slices] = shaped[mine].to("cpu")
            yield name, full


def _layout_at(layout: Layout, mesh: Mesh, rank: int) -> Layout:
    """The layout of the same parameter on another rank of this copy of the model."""
    weights, tensor = divmod(rank, mesh.tensor[1])
    other = Layout.of(layout.name, layout.full_shape, (tensor, mesh.tensor[1]))
    return other if layout.rows is None else other.with_rows((weights, mesh.weights[1]))


def load_sharded(folder: Path, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load this rank's shards of model and optimizer from a checkpoint of any mesh; returns where the run was.

    The checkpoint must be of the same model (`check_same_model`).
    """
    for name, tensors in zip(FOLDERS, _tensors(sharded, optimizer), strict=True):
        _load_slices(tensors, folder / name)
    return TrainState(**read_json(folder / STATE))


def _load_slices(tensors: dict[str, tuple[Tensor, Layout | None]], folder: Path) -> None:
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
