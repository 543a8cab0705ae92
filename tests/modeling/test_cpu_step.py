"""The flat decoding step on a CPU against the model's own chunk, and weights laid out for one row."""

import pytest
import torch

from tests.small_models import KINDS, small_model
from tnllm.modeling.config import get_preset
from tnllm.modeling.cpu_step import cpu_step, pack_weights
from tnllm.modeling.model import build_model

FORMS = [
    {},
    {"position": "lrpe-d"},
    {"position": "lrpe", "activation": "1+elu"},
    {"position": "decay", "activation": "relu"},
    {"gate": "low-rank", "activation": "none"},
    {"gate": "none", "norm": "rmsnorm"},
    {"norm": "layernorm", "norm_position": "gate"},
    {"norm": "rmsnorm", "norm_position": "output"},
    {"value_activation": "silu", "glu_activation": "silu", "scale_embedding": False},
]
# Relative to the largest logit. float64 shows that the arithmetic is the same; float32 allows 20 tokens' rounding.
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_a_chunk(form, dtype, packed):
    model = small_model(dtype, **form)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
            module.weight.data = torch.linspace(0.5, 1.5, len(module.weight), dtype=dtype)
    tokens = torch.randint(3, 352, (3, 20), generator=torch.Generator().manual_seed(0))
    state = model.init_state(3)
    state.position += 100_000  # far enough that an angle in float32 would be wrong
    with torch.no_grad():
        exact, after = model(tokens, state)
        if packed:
            pack_weights(model)
        step = cpu_step(model, state)
        # First one row, then all: the step binds its buffers again.
        logits = [step(tokens[:1, 0]).clone()]
        assert int(state.position[1]) == 100_000
        state.write(0, model.init_state(1))
        state.position[0] = 100_000
        logits = [step(column).clone() for column in tokens.unbind(1)]
    difference = (torch.stack(logits, 1) - exact).abs().max() / exact.abs().max()
    assert difference < LIMITS[dtype]
    assert torch.equal(state.position, after.position)
    for ours, theirs in zip(state.layers, after.layers, strict=True):
        assert (ours - theirs).abs().max() < LIMITS[dtype] * theirs.abs().max()


def test_steps_write_into_given_logits():
    model = small_model()
    state, logits = model.init_state(2), torch.zeros(2, 352)
    with torch.no_grad():
        expected = model.step(torch.tensor([5]), model.init_state(1))
    assert cpu_step(model, state, logits)(torch.tensor([5])).data_ptr() == logits.data_ptr()
    torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-4)
    assert not logits[1].any()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_moves_the_state_only_as_far_as_it_is_told(form, dtype):
    model = small_model(dtype, **form)
    tokens = torch.randint(3, 352, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model.hidden(tokens[:, :5])[1]
        state.position += 100_000
        before, chunk = state.clone(), cpu_step(model, state, consecutive=True)
        done = 5
        for length, count in ((6, 2), (6, 6), (1, 1), (9, 1)):
            exact, _ = model(tokens[:, done : done + length], before)
            logits = chunk(tokens[0, done : done + length])
            assert (logits - exact[0]).abs().max() < LIMITS[dtype] * exact.abs().max()
            assert all(map(torch.equal, state.layers, before.layers)) or done > 5
            chunk.advance(count)
            _, before = model.hidden(tokens[:, done : done + count], before)
            done += count
            assert state.position.equal(before.position)
            for ours, theirs in zip(state.layers, before.layers, strict=True):
                assert (ours - theirs).abs().max() <= LIMITS[dtype] * theirs.abs().max()


@pytest.mark.parametrize("form", [*KINDS[1:], {"position": "ape"}])
def test_other_forms_have_no_flat_step(form):
    model = small_model(**form)
    assert cpu_step(model, model.init_state(1)) is None


def test_no_flat_step_rounds_between_operators():
    model = small_model(torch.bfloat16)
    assert cpu_step(model, model.init_state(1)) is None


def storage_bytes(model):
    storages = [value.untyped_storage() for value in model.state_dict().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("form", [{}, *KINDS[1:], {"tie_embeddings": True}])
def test_packing_changes_no_value(form):
    # (small_model scales a head of its own.)
    preset = get_preset("tiny", vocab_size=352, model_dim=64, num_heads=4, num_layers=2, glu_dim=96)
    model = build_model(preset, seed=1).requires_grad_(False) if form.get("tie_embeddings") else small_model(**form)
    before, size = {name: value.clone() for name, value in model.state_dict().items()}, storage_bytes(model)
    pack_weights(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert storage_bytes(model) == size
    assert model.head_weight.t().is_contiguous() and not model.blocks[0].channel_mixer.l1.weight.is_contiguous()


def test_bfloat16_and_int8_keep_their_layout():
    """torch multiplies a bfloat16 row by a transposed matrix ten to thirty times as slowly."""
    model = small_model(torch.bfloat16)
    pack_weights(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    model = small_model()
    model.quantize_int8()
    before = model.embed_tokens.table
    pack_weights(model)
    assert model.embed_tokens.table is before
