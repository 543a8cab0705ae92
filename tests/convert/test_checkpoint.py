"""Training checkpoints, written by any number of ranks, one tensor at a time."""

import json
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tnllm.convert.checksums import MANIFEST
from tnllm.errors import RunError, UserError
from tnllm.modeling.config import LoraConfig, get_preset
from tnllm.modeling.lora import add_lora, lora_layers
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import config_json

CONFIG = get_preset("tiny", vocab_size=97, model_dim=32, num_heads=2, num_layers=2, glu_dim=48)


def write_rank(rank: int, world_size: int, folder: str) -> None:
    """One rank's part: matrices sharded over rows or columns, which do not always divide evenly."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29517", RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = {}
    for name, value in build_model(CONFIG, seed=0).state_dict().items():
        placement = Replicate() if "theta" in name else Shard(1) if "l3" in name else Shard(0)
        tensors[name] = distribute_tensor(value, mesh, [placement])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def step_folder(tmp_path_factory):
    """A run with one checkpoint of two ranks."""
    run = tmp_path_factory.mktemp("run")
    step = run / "checkpoints/step-00000003"
    step.mkdir(parents=True)
    # Forked, because starting two interpreters that import torch costs more than all the rest.
    mp.start_processes(write_rank, (2, str(step / "model")), nprocs=2, start_method="fork")
    (step / "config.json").write_text(config_json(CONFIG, torch.float32))
    (run / "latest").write_text("step-00000003\n")
    rows = [{"step": 3, "tokens": 6000, "loss": 4.5}, {"step": 3, "tokens": 6000, "val_loss": 4.75, "val_bpb": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return step


def test_two_ranks(step_folder, tmp_path, run):
    assert len(list((step_folder / "model").glob("*.safetensors"))) == 2
    report = run(step_folder, tmp_path / "weights", "tnllm")
    assert report.source.kind == "checkpoint"
    weights = load_file(tmp_path / "weights/model.safetensors")
    for name, value in build_model(CONFIG, seed=0).state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_in_a_checkpoint_is_merged_and_rounded_once(tmp_path, run, dtype):
    lora = LoraConfig(rank=2, alpha=6.0, targets=("out_proj", "l1"))
    model = build_model(CONFIG, dtype=torch.bfloat16, seed=0)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, lora)
    products = {}
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_B.weight.normal_()
            products[f"{name}.weight"] = 3 * (layer.lora_B.weight @ layer.lora_A.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            model.state_dict(), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "step/model")), no_dist=True
        )
    (tmp_path / "step/config.json").write_text(config_json(CONFIG, torch.bfloat16, lora))
    report = run(tmp_path / "step", tmp_path / "weights", "tnllm", dtype=dtype)
    assert report.source.num_parameters == sum(value.numel() for value in plain.values()) and len(products) == 4
    for name, value in load_file(tmp_path / "weights/model.safetensors").items():
        exact = plain[name].float() + products[name] if name in products else plain[name]
        assert torch.equal(value, exact.to(value.dtype)), name


def test_a_run_folder_and_its_figures(step_folder, tmp_path, run):
    run(step_folder.parent.parent, tmp_path / "hf", "hf", verify=False)
    card = (tmp_path / "hf/README.md").read_text()
    for row in ("| training tokens | 6K in 3 steps |", "| validation bits per byte | 2.5000 |", "Licence"):
        assert row in card


@pytest.mark.parametrize(("kept", "message"), [(0, "of wrong shape"), (1, "parts of .* are missing")])
def test_a_missing_rank(step_folder, tmp_path, run, kept, message):
    (tmp_path / "step/model").mkdir(parents=True)
    (tmp_path / "step/config.json").write_text((step_folder / "config.json").read_text())
    file = sorted((step_folder / "model").glob("*.safetensors"))[kept]
    (tmp_path / "step/model" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=message):
        run(tmp_path / "step", tmp_path / "weights", "tnllm")


def test_the_manifest_is_checked(step_folder, tmp_path, run):
    file = sorted((step_folder / "model").glob("*.safetensors"))[0]
    manifest = step_folder / MANIFEST
    manifest.write_text(json.dumps({f"model/{file.name}": [file.stat().st_size, "0" * 64]}))
    try:
        with pytest.raises(RunError, match="SHA-256 is not the recorded one"):
            run(step_folder, tmp_path / "weights", "tnllm")
    finally:
        manifest.unlink()
