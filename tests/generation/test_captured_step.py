"""The persistent decoding steps against the model's own, under Triton's interpreter with one program (GPU: all of them)."""

import pytest
import torch

from tnllm.generation.captured_step import persistent_step
from tnllm.kernels.decode_step import narrow as decode_rows
from tnllm.kernels.decode_step import wide as decode
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.model import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of(**changes):
    sizes = {"vocab_size": 101, "num_layers": 2, "model_dim": 96, "num_heads": 3, "glu_dim": 72}
    model = build_model(ModelConfig(**(sizes | changes)), DEVICE, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # large enough for every part to matter
    return model


@torch.no_grad()
def gaps(model, batch, steps=2):
    """Largest difference of logits and of states over a few steps, after some text; and both positions."""
    vocab = model.config.vocab_size
    _, state = model(torch.randint(0, vocab, (batch, 9), device=DEVICE))
    mine = state.clone()
    step = persistent_step(model, mine)
    worst = 0.0
    for _ in range(steps):
        tokens = torch.randint(0, vocab, (batch,), device=DEVICE)
        logits = model.step(tokens, state)
        step.tokens.copy_(tokens)
        step()
        worst = max(worst, float((step.logits - logits).abs().max() / logits.std()))
        top, likeliest = step.logits.max(dim=-1)
        assert torch.equal(step.tokens, likeliest) and torch.equal(step.top, top)
    assert torch.equal(state.position, mine.position)
    pairs = zip(state.layers, mine.layers, strict=True)
    return worst, max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


# fp32 sums of up to a few thousand terms in another order.
LIMIT = 2e-5


@pytest.fixture(params=["rows", "tiles"])
def kernel(request, monkeypatch):
    """Every test with the kernel of small models and with that of large ones."""
    if request.param == "tiles":
        monkeypatch.setattr(decode_rows, "fits", lambda *_: False)
    return request.param


@pytest.mark.usefixtures("poisoned_memory", "kernel")
@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (1, {}),
        (1, {"glu_activation": "silu", "value_activation": "silu", "glu_dim": 600}),
        (3, {"scale_embedding": False, "glu_activation": "silu", "value_activation": "silu"}),
        (1, {"position": "lrpe-d", "activation": "none", "model_dim": 64, "num_heads": 1, "tie_embeddings": False}),
        (1, {"model_dim": 520, "num_heads": 5, "num_layers": 1}),
    ],
)
def test_one_kernel_equals_the_model(batch, changes, monkeypatch):
    monkeypatch.setattr(decode, "MAX_BATCH", 8)  # right for several rows too, though no faster
    logits, states = gaps(model_of(**changes), batch)
    assert logits < LIMIT and states < LIMIT


@torch.no_grad()
def test_the_likeliest_token_is_one_that_may_be_chosen(kernel):
    model = model_of()
    with torch.no_grad():
        model.head_weight[90:] = 40 * model.head_weight[7]  # far ahead, but padding of the vocabulary
        model.head_weight[[20, 60]] = 5 * model.head_weight[7]  # equal ones: the first is taken
    state = model.init_state(1)
    step = persistent_step(model, state, num_choices=90)
    step.tokens.fill_(3)
    for _ in range(4):
        step()
        expected = step.logits[0, :90].argmax()
        assert int(step.tokens) == int(expected) and float(step.top) == float(step.logits[0, expected])
    assert torch.isfinite(step.top).all()
    model.head_weight[41] = torch.nan
    step()
    assert int(step.tokens) == 41 and step.top.isnan().all()


def test_the_kernel_of_small_models_is_for_widths_that_fit_into_registers():
    assert [decode_rows.fits(width, 2) for width in (96, 1024, 2048, 2560, 4096)] == [True, True, True, False, False]
    assert decode_rows.chunks(1024, 2) == (4, 1) and decode_rows.chunks(2048, 2) == (4, 2)
    for width, expected in ((1024, decode_rows.RowDecodeStep), (1280, decode.DecodeStep)):  # fp32: half as wide
        model = model_of(model_dim=width, num_heads=8, num_layers=1)
        assert type(persistent_step(model, model.init_state(1))) is expected


def test_other_models_and_large_batches_have_none():
    for changes in ({"gate": "none"}, {"norm": "rmsnorm"}, {"position": "ape"}, {"activation": "relu"}):
        model = model_of(**changes)
        assert persistent_step(model, model.init_state(1)) is None
    model = model_of()
    assert persistent_step(model, model.init_state(1)) is not None
    assert persistent_step(model, model.init_state(decode.MAX_BATCH + 1)) is None
    model.layers[1].channel_mixer.l1 = torch.nn.Sequential(model.layers[1].channel_mixer.l1)
    assert persistent_step(model, model.init_state(1)) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("width", [1024, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_on_gpu(batch, width, dtype, monkeypatch):
    monkeypatch.setattr(decode, "MAX_BATCH", 8)
    sizes = {"model_dim": width, "num_heads": width // 128, "glu_dim": width * 11 // 4}
    model = model_of(vocab_size=5003, num_layers=6, **sizes).to(dtype)
    # bf16: the model rounds every activation to 8 bits, the kernel none.
    limit = 2e-4 if dtype == torch.float32 else 0.2
    logits, states = gaps(model, batch, steps=20)
    assert logits < limit and states < limit
