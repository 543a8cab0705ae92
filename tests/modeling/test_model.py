"""The model computes the released function, causally, and every way of cutting a text gives the same numbers."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.modeling.official import forward as official_forward
from tnllm.errors import UserError
from tnllm.modeling.cache import is_cache
from tnllm.modeling.config import LoraConfig, get_preset
from tnllm.modeling.hf_names import HEAD, to_official
from tnllm.modeling.layers import GLU
from tnllm.modeling.lora import add_lora
from tnllm.modeling.model import build_model
from tnllm.modeling.packing import pack, unpack_padded

SMALL = {"vocab_size": 97, "model_dim": 64, "num_heads": 4, "num_layers": 3, "glu_dim": 96}
VARIANTS = {
    "v1": {},
    "v2": {"scale_embedding": False},
    "v3": {"gate": "low-rank", "gate_dim": 8},
    "no-gate": {"gate": "none"},
    "lrpe-d": {"position": "lrpe-d"},
    "lrpe": {"position": "lrpe"},
    "decay": {"position": "decay"},
    "ape": {"position": "ape", "max_position": 64},
    "linear-slopes": {"decay_slopes": "linear"},
    "1+elu": {"activation": "1+elu"},
    "norm-after-gate": {"norm_position": "gate"},
    "norm-of-output": {"norm_position": "output"},
    "rmsnorm": {"norm": "rmsnorm", "activation": "none"},
    "layernorm": {"norm": "layernorm", "glu_activation": "silu", "tie_embeddings": False},
    "transformer": {"kind": "transformer", "norm": "rmsnorm", "glu_activation": "silu"},
    "hybrid": {"softmax_every": 2, "qk_norm": True},
    "all-softmax": {"softmax_every": 1},
}


def small(name="v1", dtype=torch.float64, **more):
    config = get_preset("tiny", **SMALL, **VARIANTS[name], **more)
    # Larger weights than at the start of training, so that every part of the model moves the logits.
    return build_model(config, dtype=dtype, seed=1).apply(widen)


def widen(module):
    if isinstance(module, torch.nn.Linear):
        with torch.no_grad():
            module.weight.mul_(5)


def text(batch, length, seed=0):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_equals_the_released_forward(name):
    model = small(name)
    weights = {to_official(key): value.double() for key, value in model.state_dict().items()}
    weights["lm_head.weight"] = model.head_weight
    tokens = text(2, 150)
    with torch.no_grad():
        expected = official_forward(weights, model.config, tokens)
        # Decays, theta, cos and sin are fp32 by definition; the restatement uses exact ones. Measured: 1e-7.
        close(model(tokens)[0], expected, atol=1e-6 * expected.std().item())


def test_keys_are_five_per_layer_and_three():
    model = small("v1")
    keys = [*map(to_official, model.state_dict()), HEAD]  # released files list the tied head
    assert len(keys) == len(set(keys)) == 5 * model.config.num_layers + 3
    assert {"model.embed_tokens.weight", "model.layers.0.token_mixer.lrpe.theta", "lm_head.weight"} <= set(keys)
    assert tuple(model.state_dict()["layers.0.token_mixer.lrpe.theta"].shape) == (4, 1, 16)
    assert tuple(model.state_dict()["layers.2.token_mixer.qkvu_proj.weight"].shape) == (256, 64)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_any_split_gives_the_same_logits_and_state(name):
    model, tokens = small(name), text(2, 40)
    full, end = model(tokens)
    state, parts = None, []
    for piece in tokens.split([1, 17, 2, 19, 1], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    close(torch.cat(parts, 1), full)
    assert state.position.tolist() == [40, 40]
    for ours, theirs in zip(state.layers, end.layers, strict=True):
        # Caches may have free slots.
        close(*((ours[:, :, :40], theirs[:, :, :40]) if is_cache(ours) else (ours, theirs)))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_steps_equal_the_full_forward(name):
    model, tokens = small(name), text(3, 30)
    full, _ = model(tokens)
    _, state = model(tokens[:, :11])
    kept = state.clone()
    for index in range(11, 30):
        close(model.step(tokens[:, index], state), full[:, index])
    assert state.position.tolist() == [30] * 3
    # Forward never changes the state it is given.
    before = kept.clone()
    model(tokens[:, 11:], kept)
    assert all(torch.equal(a, b) for a, b in zip(kept.layers, before.layers, strict=True))
    assert torch.equal(kept.position, before.position)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(["v1", "lrpe-d", "transformer", "hybrid"]))
def test_packed_equals_alone(lengths, name):
    """Right padding is dropped by packing, so the state is frozen at each row's real end."""
    model = small(name)
    tokens = text(len(lengths), max(lengths))
    with torch.no_grad():
        packed, cu_seqlens = pack([row[:length] for row, length in zip(tokens, lengths, strict=True)])
        logits, state = model(packed, None, cu_seqlens)
        rows = unpack_padded(logits, cu_seqlens, max(lengths))
        more, state = model(text(len(lengths), 3, seed=5), state)
        for row, length in enumerate(lengths):
            alone, own = model(tokens[row : row + 1, :length])
            close(rows[row, :length], alone[0])
            close(more[row], model(text(len(lengths), 3, seed=5)[row : row + 1], own)[0][0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1", "transformer", "hybrid"])
def test_packing_continues_states_of_unequal_age(name):
    model, tokens = small(name), text(2, 30)
    _, a = model(tokens[:1, :5])
    _, b = model(tokens[1:, :11])
    both = type(a).cat([a, b])
    assert both.position.tolist() == [5, 11]
    pieces = torch.cat([tokens[0, 5:9], tokens[1, 11:30]])[None]
    logits, state = model(pieces, both, torch.tensor([0, 4, 23], dtype=torch.int32))
    assert state.position.tolist() == [9, 30]
    close(logits[0, :4], model(tokens[:1, 5:9], a)[0][0])
    close(logits[0, 4:], model(tokens[1:, 11:], b)[0][0])
    swapped = state.select([1, 0, 1])
    step = model.step(torch.tensor([3, 4, 3]), swapped)
    close(step[0], step[2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1", "lrpe", "lrpe-d", "transformer", "hybrid"])
def test_causal_even_without_decay(name):
    model, tokens = small(name), text(1, 80)
    changed = tokens.clone()
    changed[0, 50] = (changed[0, 50] + 1) % 97
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.allclose(a[:, 50:], b[:, 50:])


@torch.no_grad()
def test_a_common_shift_of_positions_changes_nothing():
    model, tokens = small("lrpe-d"), text(1, 20)
    state = model.init_state(1)
    state.position += 1000
    # fp32 cos and sin of different angles: 1e-7 relative in every product.
    close(model(tokens, state)[0], model(tokens)[0], atol=1e-4)


@torch.no_grad()
def test_two_runs_in_a_row_are_equal():
    model, tokens = small(dtype=torch.float32), text(2, 33)
    first, second = model(tokens), model(tokens)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1].layers, second[1].layers, strict=True))


@pytest.mark.parametrize("name", ["v1", "v3", "norm-after-gate", "norm-of-output", "transformer", "hybrid"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_the_summed_cross_entropy(name, packed):
    model, tokens = small(name), text(2, 24)
    labels = text(2, 24, seed=3)
    labels[0, 3] = -100
    cu_seqlens = None
    if packed:
        tokens, labels = tokens.view(1, -1), labels.view(1, -1)
        cu_seqlens = torch.tensor([0, 10, 24, 48, 48, 48], dtype=torch.int32)
    loss = model.loss(tokens, labels, cu_seqlens)
    # The head may compute the counted labels alone.
    counted = (labels.flatten() != -100).nonzero()[:, 0]
    assert loss.item() == pytest.approx(model.loss(tokens, labels, cu_seqlens, counted=counted).item(), rel=1e-6)
    loss.backward()
    got = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    if packed:
        pieces = torch.cat([model(piece)[0] for piece in tokens.split([10, 14, 24], dim=1)], 1)
    else:
        pieces = model(tokens)[0]
    expected = torch.nn.functional.cross_entropy(pieces.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(got[key], parameter.grad, atol=2e-5, rtol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", ["v1", "v3", "rmsnorm", "transformer", "hybrid"])
def test_activation_checkpointing_changes_no_gradient(name, mode):
    model, tokens = small(name), text(1, 20)
    model.loss(tokens, tokens).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_activation_checkpointing(mode)
    model.loss(tokens, tokens).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
    with pytest.raises(UserError, match="allowed: none, selective, full"):
        model.set_activation_checkpointing("some")


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["v1", "transformer"])
def test_both_halves_of_the_glu_in_one_product(name, mode, monkeypatch):
    """What training does on CUDA, here on CPU: the same function and gradients; adapters on a half keep it apart."""
    model, tokens = small(name), text(1, 20)
    loss = model.loss(tokens, tokens)
    loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    products = model.blocks[0].num_products
    model.zero_grad()
    add_lora(adapted := small(name), LoraConfig(rank=2, targets=("l2",)))
    assert not model.blocks[0].channel_mixer.fuses_up_projections
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert model.blocks[0].channel_mixer.fuses_up_projections and model.blocks[0].num_products == products - 1
    assert not adapted.blocks[0].channel_mixer.fuses_up_projections
    monkeypatch.undo()
    monkeypatch.setattr(GLU, "fuses_up_projections", True)
    model.set_activation_checkpointing(mode)
    again = model.loss(tokens, tokens)
    again.backward()
    close(again, loss)
    for a, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_selective_recomputation_compiles_in_one_graph():
    model, tokens = small(), text(1, 20)
    model.loss(tokens, tokens).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_activation_checkpointing("selective")
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    compiled(tokens, tokens).backward()
    for a, parameter in zip(plain, model.parameters(), strict=True):
        # float64 sums of the decomposed norms in another order.
        torch.testing.assert_close(a, parameter.grad, atol=1e-9, rtol=1e-9)


def test_learned_positions_run_out_with_a_clear_line():
    with pytest.raises(UserError, match=r"65 tokens exceed model.max_position 64"):
        small("ape")(text(1, 65))


def test_a_seed_fixes_the_weights():
    a, b = small(), small()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.embed_tokens.weight[0].abs().sum() == 0
    assert a.embed_tokens.weight[1:].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_decode_agrees_with_its_own_forward():
    """Decays of late layers survive bfloat16 weights: stepping and scanning see the same ones."""
    model, tokens = small(dtype=torch.bfloat16), text(1, 200)
    full, _ = model(tokens)
    _, state = model(tokens[:, :1])
    steps = torch.stack([model.step(tokens[:, index], state) for index in range(1, 200)], 1)
    assert full.dtype == steps.dtype == torch.float32
    # bfloat16 rounds activations to 8 bits (4e-3) in every layer; both paths round at the same points but sum
    # in another order.
    error = (steps - full[:, 1:]).norm() / full.norm()
    assert error < 2e-2


@pytest.mark.slow
def test_everything_compiles_in_one_graph():
    model, tokens = small(dtype=torch.float32), text(1, 16)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (16, 12):
        piece = tokens[:, :length]
        torch.testing.assert_close(compiled(piece, piece), model.loss(piece, piece))


@pytest.mark.slow
def test_a_hybrid_compiles_for_training_and_validation_at_changing_lengths(monkeypatch):
    """Layers with and without LRPE and softmax layers, with and without gradients, fixed and varying lengths."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = small("hybrid", dtype=torch.float32)
    eager, tokens = small("hybrid", dtype=torch.float32), text(1, 24)
    model.compile_blocks()
    for ends in ([0, 9, 24], [0, 12, 24], [0, 4, 9, 24], [0, 3, 10, 20, 24]):
        packed = torch.tensor(ends, dtype=torch.int32)
        longest = int(packed.diff().max())
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                loss = model.loss(tokens, tokens, packed, longest=longest)
                torch.testing.assert_close(loss, eager.loss(tokens, tokens, packed, longest=longest))
