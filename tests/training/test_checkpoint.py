"""Checkpoints: complete or absent, damage reported, the previous one used instead."""

import resource

import pytest
import torch

from tnllm.errors import RunError, UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import load_model
from tnllm.training.checkpoint import (
    MANIFEST,
    Saver,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
)
from tnllm.training.optim import clip_and_step, make_optimizer
from tnllm.training.sections import OptimizerSection

CONFIG = get_preset("tiny", vocab_size=50, model_dim=16, num_heads=2, num_layers=2, glu_dim=24)


def make(seed: int):
    model = build_model(CONFIG, seed=seed)
    return model, make_optimizer(model, OptimizerSection())


def update(model, optimizer) -> None:
    tokens = torch.randint(0, 50, (2, 9))
    loss = model.loss(tokens, tokens)
    loss.backward()
    clip_and_step(model, optimizer, 1e-2, 1.0, loss.detach())


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints of a small run, at steps 1 and 2."""
    model, optimizer = make(0)
    saver = Saver(tmp_path, keep=3, background=True, tokenizer=None)
    for step in (1, 2):
        update(model, optimizer)
        saver.save(TrainState(step, step * 8, step * 64), model, optimizer)
    saver.wait()
    return model, optimizer


def test_everything_comes_back(tmp_path, saved):
    model, optimizer = make(1)
    state = load_checkpoint(find_checkpoint(tmp_path, "auto", print), model, optimizer)
    assert state == TrainState(2, 16, 128)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    for a, b in zip(saved[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in saved[1].state[a].items():
            assert torch.equal(value, optimizer.state[b][key])
    # The random state too: both go on alike.
    torch.manual_seed(5)
    load_checkpoint(find_checkpoint(tmp_path, "auto", print), model, optimizer)
    first = torch.rand(3)
    torch.manual_seed(6)
    load_checkpoint(find_checkpoint(tmp_path, "auto", print), model, optimizer)
    assert torch.equal(first, torch.rand(3))


def test_a_fresh_optimizer_can_be_saved_and_resumed(tmp_path):
    model, optimizer = make(0)
    saver = Saver(tmp_path, keep=1, background=False, tokenizer=None)
    saver.save(TrainState(), model, optimizer)
    assert load_checkpoint(tmp_path / "checkpoints/step-00000000", *make(1)) == TrainState()


def test_nothing_is_pickled(tmp_path, saved):
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ""}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and not p.suffix] == ["latest"]


def newest_file(tmp_path, name):
    return next((tmp_path / "checkpoints/step-00000002").rglob(name))


DAMAGES = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "bytes, not the"),
    "flipped": (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"), "was changed after it was written"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["*.safetensors", "state.json"])
def test_damage_is_named_and_the_one_before_used(tmp_path, saved, how, name):
    spoil, message = DAMAGES[how]
    spoil(newest_file(tmp_path, name))
    with pytest.raises(RunError, match=message):
        verify_checkpoint(tmp_path / "checkpoints/step-00000002")
    warnings: list[str] = []
    assert find_checkpoint(tmp_path, "auto", warnings.append).name == "step-00000001"
    assert len(warnings) == 1 and "step-00000002 cannot be used" in warnings[0] and message in warnings[0]
    with pytest.raises(RunError, match=message):
        find_checkpoint(tmp_path, str(tmp_path), print)


def test_where_all_are_damaged_the_run_stops_and_says_so(tmp_path, saved):
    for file in tmp_path.rglob("state.json"):
        file.unlink()
    warnings: list[str] = []
    with pytest.raises(RunError, match=r"no checkpoint in .* can be used; move that folder away to start a new run"):
        find_checkpoint(tmp_path, "auto", warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_generating_from_a_damaged_step_is_one_line(tmp_path, saved, how):
    DAMAGES[how][0](next((tmp_path / "checkpoints/step-00000002/model").glob("*.safetensors")))
    with pytest.raises(RunError, match="is damaged or not a checkpoint of this model") as caught:
        load_model(tmp_path / "checkpoints/step-00000002")
    assert "\n" not in str(caught.value)


def test_an_unfinished_folder_is_never_taken(tmp_path, saved):
    newest_file(tmp_path, MANIFEST).unlink()
    assert find_checkpoint(tmp_path, "auto", lambda text: None).name == "step-00000001"
    (tmp_path / "checkpoints/step-00000009.tmp-save").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    Saver(tmp_path, keep=1, background=False, tokenizer=None)
    assert not (tmp_path / "checkpoints/step-00000009.tmp-save").exists()


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = make(0)
    saver = Saver(tmp_path, keep=2, background=False, tokenizer=None)
    for step in range(5):
        saver.save(TrainState(step), model, optimizer)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


@pytest.fixture
def no_room():
    """Files of this process may not grow beyond 2,000 bytes: the system refuses the write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_is_one_line_and_loses_nothing(tmp_path, saved, no_room, background):
    saver = Saver(tmp_path, keep=1, background=background, tokenizer=None)
    with pytest.raises(
        RunError, match=r"could not be written \(.*File too large\); the one before is intact"
    ) as caught:
        saver.save(TrainState(3), *saved)
        saver.wait()
    assert "\n" not in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))
    assert find_checkpoint(tmp_path, "auto", print).name == "step-00000002"


def test_no_checkpoint_there(tmp_path):
    assert find_checkpoint(tmp_path, "auto", print) is None
    with pytest.raises(UserError, match="no checkpoint there; give a run folder, a step folder or auto"):
        find_checkpoint(tmp_path, str(tmp_path), print)
