"""Decays: the released values, fp32 whatever the model is cast to."""

import math

import pytest
import torch

from tnllm.modeling.config import get_preset
from tnllm.modeling.decay import geometric_slopes, initial_theta, log_decay
from tnllm.modeling.model import build_model

POWERS_OF_TWO_HALVES = [2.0 ** (-(h + 1) / 2) for h in range(16)]
POWERS_OF_TWO_QUARTERS = [2.0 ** (-(h + 1) / 4) for h in range(32)]
TABLE = {
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
    16: POWERS_OF_TWO_HALVES,
    20: [*POWERS_OF_TWO_HALVES, 0.840896, 0.594604, 0.420448, 0.297302],
    32: POWERS_OF_TWO_QUARTERS,
    40: [
        *POWERS_OF_TWO_QUARTERS,
        *[0.917004, 0.771105, 0.648420, 0.545254, 0.458502, 0.385553, 0.324210, 0.272627],
    ],
}


@pytest.mark.parametrize(("heads", "values"), TABLE.items())
def test_slopes_are_the_released_ones(heads, values):
    assert geometric_slopes(heads) == pytest.approx(values, abs=5e-7)


def test_depth_slows_the_decay():
    config = get_preset("385m")
    first, last = log_decay(config, 0), log_decay(config, config.num_layers - 1)
    assert first[0].item() == pytest.approx(-0.5 * (1 + 1e-5))
    assert last[0].item() == pytest.approx(-0.5e-5, rel=1e-6)
    assert log_decay(get_preset("385m", decay_temperature=False), 23)[0].item() == -0.5


def test_one_layer_has_a_decay():
    decay = log_decay(get_preset("tiny", num_layers=1), 0)
    assert torch.isfinite(decay).all() and (decay < 0).all()


def test_printed_formula_is_linear_in_the_head():
    decay = log_decay(get_preset("385m", decay_slopes="linear"), 12)
    assert decay.tolist() == pytest.approx([-h * 0.5 for h in range(8)])


def test_no_decay_without_one():
    assert log_decay(get_preset("385m", position="lrpe"), 3).tolist() == [0.0] * 8


def test_decays_stay_fp32_under_every_cast():
    config = get_preset("tiny", num_layers=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_model(config, dtype=torch.bfloat16, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).half().bfloat16()
    for layer, block in enumerate(model.layers):
        kept = block.token_mixer.log_decay
        assert kept.dtype == torch.float32
        assert torch.equal(kept, log_decay(config, layer))
        # In bfloat16 the last layer's decays would be exactly 1.
        assert (kept.exp() < 1).all()
    assert model.layers[2].token_mixer.log_decay.bfloat16().exp().max() == 1


def test_theta_is_one_frequency_per_head_and_channel_and_stays_fp32():
    config = get_preset("7b")
    theta = initial_theta(config)
    assert theta.shape == (32, 1, 128)
    assert theta[0, 0, 0] == 1
    assert theta[31, 0, 127].item() == pytest.approx(10_000 ** (-2 * 4095 / 4096), rel=1e-6)
    assert (theta < 1e-4).float().mean().item() == pytest.approx(0.5, abs=1e-3)
    model = build_model(get_preset("tiny"), dtype=torch.bfloat16, seed=0).to(torch.bfloat16)
    theta = model.layers[0].token_mixer.lrpe.theta
    assert theta.dtype == torch.float32
    assert torch.equal(theta, initial_theta(model.config))
    assert model.layers[1].token_mixer.lrpe is None
    assert math.isclose(model.double().layers[0].token_mixer.lrpe.theta[0, 0, 1].item(), theta_at(model.config, 1))


def theta_at(config, index: int) -> float:
    return float(torch.tensor(10_000 ** (-2 * index / config.model_dim), dtype=torch.float32))
