"""bf16 weights: rounding at random is right on average, small updates survive, runs resume exactly."""

import json

import pytest
import torch

from tests.training.sections import memory_of
from tnllm.errors import UserError
from tnllm.modeling.model import build_model
from tnllm.training.bf16_adamw import _CHUNK, Bf16AdamW, _hash, round_randomly
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.optim import clip_and_step, make_optimizer
from tnllm.training.sections import OptimizerSection


def test_rounding_is_between_neighbours_and_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(50) * 10.0 ** torch.randint(-20, 20, (50,))
    bits = _hash(torch.arange(20_000))
    rounded = round_randomly(x[:, None].expand(-1, 20_000), bits).float()
    down = (x.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((rounded == down[:, None]) | (rounded == up[:, None])).all()
    # The share of ups is a mean of 20,000 draws: standard error at most 0.0035.
    share = (rounded == up[:, None]).float().mean(1)
    torch.testing.assert_close(share, (x - down) / (up - down), atol=0.016, rtol=0)


def test_numbers_of_bf16_are_left_alone():
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_randomly(x.float(), _hash(torch.arange(1000))), x)
    assert torch.equal(round_randomly(torch.zeros(3), torch.full((3,), 0xFFFF)), torch.zeros(3).bfloat16())


def test_hash_bits_are_fair_and_independent():
    bits = _hash(torch.arange(1 << 16))
    ones = torch.stack([(bits >> index) & 1 for index in range(32)]).float()
    assert (ones.mean(1) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(ones) - torch.eye(32)).abs().max() < 0.03


def test_an_update_too_small_for_bf16_still_counts():
    """Weight 1, learning rate 1e-4: to the nearest bf16 (steps of 0.0078 above, 0.0039 below) it would never move."""
    layer = torch.nn.Linear(64, 64, bias=False).bfloat16()
    torch.nn.init.ones_(layer.weight)
    optimizer = make_optimizer(layer, OptimizerSection(weight_decay=0.0))
    assert isinstance(optimizer, Bf16AdamW)
    for _ in range(20):
        layer.weight.grad = torch.ones_like(layer.weight)
        clip_and_step(layer, optimizer, 1e-4, 0.0, torch.tensor(1.0))
    assert layer.weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=3e-4)


def test_an_fp32_parameter_is_updated_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": list(ours.parameters()), "weight_decay": 0.1}]
    a = Bf16AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        a.step()
        b.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # fp32 in another order


def test_a_refused_update_changes_nothing():
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = make_optimizer(layer, OptimizerSection())
    for loss in (1.0, float("nan")):
        before = [t.clone() for t in (layer.weight, *optimizer.state[layer.weight].values())]
        layer.weight.grad = torch.ones_like(layer.weight)
        clip_and_step(layer, optimizer, 0.1, 1.0, torch.tensor(loss))
    after = [layer.weight, *optimizer.state[layer.weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_chunks_change_nothing(monkeypatch):
    def run(chunk: int) -> torch.Tensor:
        layer = torch.nn.Linear(16, 16, bias=False).bfloat16()
        torch.nn.init.ones_(layer.weight)
        optimizer = make_optimizer(layer, OptimizerSection())
        optimizer._chunk = chunk
        layer.weight.grad = torch.linspace(-1, 1, 256).reshape(16, 16).bfloat16()
        optimizer.step()
        return layer.weight

    assert torch.equal(run(7), run(_CHUNK))


@pytest.mark.slow
def test_a_run_learns_and_resumes_bit_for_bit(recipe, config, tmp_path):
    def losses(run):
        rows = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    sets = ["train.weights=bf16"]
    train(load_recipe(str(recipe), sets), tmp_path / "uninterrupted")
    train(load_recipe(str(recipe), [*sets, "train.max_steps=10"]), tmp_path / "parts")
    train(load_recipe(str(recipe), sets), tmp_path / "parts", resume="auto")
    train(config, tmp_path / "fp32")
    assert losses("parts") == losses("uninterrupted")
    # Both end near 4.2 from 5.8; rounding noise is well below what was learned.
    assert losses("uninterrupted")[-1] == pytest.approx(losses("fp32")[-1], rel=0.05)
    assert losses("uninterrupted")[-1] < 0.85 * losses("uninterrupted")[0]


def test_half_the_memory(recipe):
    wide, narrow = (
        memory_of(load_recipe(str(recipe), [f"train.weights={kind}"]), low_precision=True) for kind in ("fp32", "bf16")
    )
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(narrow, part) * 2 == getattr(wide, part)
    assert narrow.casts == 0 < wide.casts


def test_what_does_not_go_together_is_told(recipe):
    with pytest.raises(UserError, match=r"train.weights is bf16, which cannot be combined with train.dtype fp32"):
        load_recipe(str(recipe), ["train.weights=bf16", "train.dtype=fp32"])


def test_theta_stays_fp32(config):
    model = build_model(config.model, dtype=torch.bfloat16, seed=0)
    optimizer = make_optimizer(model, config.optimizer)
    model.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    theta = model.get_parameter("layers.0.token_mixer.lrpe.theta")
    assert optimizer.state[theta]["exp_avg"].dtype == torch.float32
