"""Presets have the published sizes; bad choices name themselves."""

import json

import pytest
import torch

from tnllm.errors import UserError
from tnllm.modeling.cache import is_cache, resized
from tnllm.modeling.config import PRESETS, get_preset
from tnllm.modeling.flops import count_parameters, flops_per_token, state_bytes
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import config_json

# Released checkpoints, counted from their files.
RELEASED = {
    "385m": 398_984_192,
    "1b": 1_020_266_496,
    "1b-v2": 1_020_266_496,
    "3b": 2_911_111_680,
    "7b": 6_836_719_616,
    "7b-v2": 6_836_719_616,
    "15b": 14_833_382_400,
}
# The first paper's table: vocabulary 50,272, and D/2 extra parameters in every layer where the released models have
# D in layer 0 alone.
PRINTED = {
    "1b": 992_165_888,
    "3b": 2_876_006_400,
    "7b": 6_780_547_072,
    "13b": 12_620_195_840,
    "65b": 63_528_009_728,
}


def built(config) -> int:
    return sum(parameter.numel() for parameter in build_model(config, "meta").parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_formula_counts_what_is_built(name):
    assert count_parameters(PRESETS[name]) == built(PRESETS[name])


@pytest.mark.parametrize(("name", "count"), RELEASED.items())
def test_released_sizes(name, count):
    assert built(PRESETS[name]) == count


@pytest.mark.parametrize(("name", "count"), PRINTED.items())
def test_printed_sizes(name, count):
    config = get_preset(name, vocab_size=50_272)
    half_theta_everywhere = config.num_layers * config.model_dim // 2 - config.model_dim
    assert count_parameters(config) + half_theta_everywhere == count


def test_175b_is_within_a_thousandth_of_the_printed_size():
    assert count_parameters(PRESETS["175b"]) == pytest.approx(173_023_133_696, rel=1e-3)


def test_ablation_checkpoint_size():
    assert count_parameters(get_preset("385m", vocab_size=50_272)) == 384_926_720


@pytest.mark.parametrize(
    "choice",
    [
        {"gate": "none"},
        {"gate": "low-rank"},
        {"position": "ape"},
        {"position": "lrpe-d"},
        {"norm": "layernorm"},
        {"tie_embeddings": False},
        {"kind": "transformer"},
        {"kind": "transformer", "norm": "rmsnorm"},
        {"softmax_every": 3},
        {"softmax_every": 1, "qk_norm": True, "gate": "low-rank"},
    ],
)
def test_formula_counts_every_choice(choice):
    config = get_preset("tiny", **choice)
    assert count_parameters(config) == built(config)


def test_flops_and_state_do_not_grow_with_length():
    config = PRESETS["385m"]
    assert flops_per_token(config, 1024) == flops_per_token(config, 1 << 20)
    # 4 H d d (L + 1) bytes: layer 0 is twice as wide.
    assert state_bytes(config) == 4 * 8 * 128 * 128 * 25
    baseline = get_preset("385m", kind="transformer")
    assert flops_per_token(baseline, 65_536) > flops_per_token(baseline, 2048)
    assert state_bytes(baseline, 2000) == 2 * state_bytes(baseline, 1000)


@pytest.mark.parametrize(("every", "layers"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4])])
def test_layers_of_a_hybrid(every, layers):
    config = get_preset("tiny", num_layers=5, softmax_every=every)
    assert [layer for layer in range(5) if config.is_softmax(layer)] == layers
    assert config.num_softmax == len(layers)
    state = build_model(config).init_state(1)
    assert [layer for layer, values in enumerate(state.layers) if is_cache(values)] == layers
    state.layers = [resized(values, 100) if is_cache(values) else values for values in state.layers]
    assert state.nbytes == state_bytes(config, 100, cache_itemsize=4)


def test_files_of_models_without_softmax_layers_do_not_know_the_key():
    config = get_preset("tiny")
    assert "softmax_every" not in json.loads(config_json(config, torch.float32))["model"]
    # The hash is that of version 0.1, so state files stay valid.
    assert "softmax_every" not in config.model_dump_json(exclude=config.unset)
    hybrid = get_preset("tiny", softmax_every=2)
    assert json.loads(config_json(hybrid, torch.float32))["model"]["softmax_every"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layer": 3}, "model.num_layer: no such key; did you mean 'num_layers'?"),
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"num_heads": 7}, "model_dim 1024 must be a multiple of num_heads 7"),
        ({"gate": "half"}, "model.gate is 'half'"),
        ({"kind": "transformer", "gate": "none"}, "gate does not apply to kind transformer"),
        ({"num_layers": 4, "softmax_every": 5}, "softmax_every 5 is more than num_layers 4, so no layer"),
        ({"softmax_every": -1}, "model.softmax_every is -1"),
        ({"softmax_every": 2, "kind": "transformer"}, "softmax_every does not apply to kind transformer"),
        ({"qk_norm": True}, "qk_norm does not apply to kind transnormer without softmax_every"),
        ({"model_dim": 24, "softmax_every": 2}, "rotary positions need an even head width, not 3"),
        ({"pad_token_id": 64_000}, "pad_token_id 64000 must be below vocab_size 64000"),
    ],
)
def test_bad_choices(overrides, message):
    with pytest.raises(UserError) as error:
        get_preset("385m", **overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean '385m'"):
        get_preset("385mm")
