"""An adapter trained by two gloo processes is that of one process: losses, files, a run that changes its mesh."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed import TCPStore

from tests.training.test_finetune import base, chat, rows  # noqa: F401 (fixtures)
from tnllm.errors import UserError
from tnllm.modeling import load_model
from tnllm.parallel.mesh import close_mesh
from tnllm.training.config import load_recipe
from tnllm.training.launch import config_mesh
from tnllm.training.loop import train

pytestmark = pytest.mark.slow

# fp32 sums in another order, grown by twelve updates at a high learning rate.
LOSS = 2e-5
ADAPTER = ["lora.rank=4", "eval.sample_prompts=[]", "train.micro_batch_size=1", "eval.every_steps=4"]
LOW = [*ADAPTER, "train.dtype=bf16", "train.max_steps=3", "eval.sample_prompts=the quick"]
SHORT = [*ADAPTER, "train.max_steps=3", "optimizer.grad_clip=0.05", "lora.targets=[l1]"]
# run → its parts: what is set, on how many processes
RUNS = {
    "mesh": [
        ([*ADAPTER, "parallel.shard=2", "train.max_steps=4"], 2),
        ([*ADAPTER, "train.max_steps=8"], 1),
        ([*ADAPTER, "parallel.replicate=2"], 2),
    ],
    "sequence": [([*SHORT, "parallel.sequence=2"], 2)],
    "low": [([*LOW, "parallel.shard=2"], 2), ([*LOW, "parallel.shard=2", "lora.rank=2"], 2)],
}
ALONE = {"mesh alone": ADAPTER, "sequence alone": SHORT, "low alone": LOW}


def rank_main(rank: int, recipe: str, folder: Path, ports: list[int]) -> None:
    """All of RUNS; while the first process goes on alone, the second makes what they are compared with."""
    torch.set_num_threads(1)
    for run, parts in RUNS.items():
        for number, (sets, processes) in enumerate(parts):
            config, resume = load_recipe(recipe, sets), "auto" if number else None
            if processes == 1 and rank == 0:
                train(config, folder / run, resume)
            elif processes == 1:
                for name, reference in ALONE.items():
                    train(load_recipe(recipe, reference), folder / name)
            else:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(ports.pop())}
                mesh = config_mesh(config.parallel, "cpu")
                try:
                    train(config, folder / run, resume, mesh)
                except UserError as error:
                    (folder / f"rank-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
                close_mesh(mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture
def runs(chat, folder, monkeypatch):  # noqa: F811
    """The folder of all runs, made once by two processes."""
    if not (folder / "mesh").exists():
        for name, value in {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # the stores live here, one for each mesh
        meshes = sum(processes == 2 for parts in RUNS.values() for _, processes in parts)
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(meshes)]
        multiprocessing.spawn(rank_main, (chat, folder, [store.port for store in stores]), nprocs=2)
    return folder


def test_a_run_that_changes_its_mesh_has_the_losses_of_one_process(runs):
    for key in ("loss", "val_loss", "grad_norm"):
        ours, expected = rows(runs / "mesh", key), rows(runs / "mesh alone", key)
        assert ours == pytest.approx(expected, rel=LOSS if key != "grad_norm" else 5e-4), key
    losses = rows(runs / "mesh")
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2


def test_ranks_that_share_a_row_clip_as_one_process_does(runs):
    ours, expected = (rows(runs / name, "grad_norm") for name in ("sequence", "sequence alone"))
    assert ours == pytest.approx(expected, rel=5e-4) and min(ours) > 0.05
    assert rows(runs / "sequence") == pytest.approx(rows(runs / "sequence alone"), rel=LOSS)


def test_adapter_and_merged_weights_are_written_alike(runs):
    settings = [
        json.loads((runs / name / "adapter/adapter_config.json").read_text()) for name in ("mesh", "mesh alone")
    ]
    assert settings[0] == settings[1] and settings[0]["r"] == 4
    ours, expected = (load_file(runs / name / "adapter/adapter_model.safetensors") for name in ("mesh", "mesh alone"))
    assert list(ours) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=5e-6)
    ours, expected = (load_model(runs / name).state_dict() for name in ("mesh", "mesh alone"))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=5e-6)
        if "proj" not in name and "channel_mixer" not in name:
            assert torch.equal(ours[name], value), name


def test_frozen_weights_are_in_bf16_where_products_are(runs):
    assert rows(runs / "low") == pytest.approx(rows(runs / "low alone"), rel=LOSS)
    stored = {}
    for name in ("low", "low alone"):
        files = (runs / name / "checkpoints/step-00000003/model").glob("*.safetensors")
        stored[name] = {key: value for file in files for key, value in load_file(file).items()}
    assert stored["low"].keys() == stored["low alone"].keys()
    for key, value in stored["low alone"].items():
        assert stored["low"][key].dtype == value.dtype, key
        assert value.dtype == (torch.float32 if "lora_" in key or "theta" in key else torch.bfloat16)
        if "lora_" not in key:
            assert torch.equal(stored["low"][key], value), key


def test_another_adapter_is_refused_once(runs):
    said = [(runs / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert said[0].startswith("UserError: lora is not as in step-00000003; a resumed run keeps its adapter")
    assert said[1].startswith("SharedError: ")
