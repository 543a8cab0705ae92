"""Which weights decay, and updates that refuse what is not finite."""

import pytest
import torch

from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.training.optim import clip_and_step, decays, make_optimizer
from tnllm.training.sections import OptimizerSection


def test_theta_and_norm_weights_do_not_decay():
    model = build_model(get_preset("tiny", norm="layernorm"), "meta")
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert "layers.0.token_mixer.lrpe.theta" in spared
    assert {name.rsplit(".", 2)[-2] for name in spared} == {"lrpe", "token_norm", "channel_norm", "norm", "final_norm"}


def test_groups_hold_every_weight_once():
    model = build_model(get_preset("tiny", num_layers=2), seed=0)
    optimizer = make_optimizer(model, OptimizerSection(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(
        set(map(id, grouped))
    )


@pytest.mark.parametrize("bad", ["loss", "gradient", None])
def test_clip_and_step(bad):
    weight = torch.nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(weight, OptimizerSection(weight_decay=0.0))
    before = weight.weight.clone()
    weight.weight.grad = torch.full((2, 3), float("inf") if bad == "gradient" else 4.0)
    loss = torch.tensor(float("nan") if bad == "loss" else 1.0)
    norm = clip_and_step(weight, optimizer, 0.1, 1.0, loss)
    assert weight.weight.grad is None
    if bad == "gradient":
        assert not torch.isfinite(norm)
    else:
        assert norm.item() == pytest.approx(4 * 6**0.5)
    assert torch.equal(weight.weight, before) == (bad is not None)
    if bad is None:
        # Adam's first update is the learning rate against the gradient's sign.
        torch.testing.assert_close(weight.weight, before - 0.1)
